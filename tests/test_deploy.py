"""The examples in docs/deploy say what they promise, in options and paths that exist."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from trtpool.broker.cli import cli

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "docs" / "deploy"
RUN = "/run/trtpool"

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DEPLOYMENT: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINERS = {container["name"]: container for container in POD["containers"]}


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The options of ``trtpool WORDS``; whatever is not understood raises."""
    return dict(cli.commands[words[0]].make_context(words[0], list(words[1:])).params)


def commands() -> list[list[str]]:
    """Every command line of trtpool in the examples."""
    services = COMPOSE["services"]
    probes = [CONTAINERS["pool"][name]["exec"]["command"] for name in ("startupProbe", "livenessProbe")]
    return [
        services["pool"]["command"],
        services["pool"]["healthcheck"]["test"][2:],
        CONTAINERS["pool"]["args"],
        *(probe[1:] for probe in probes),
    ]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words):
    assert parse(words)


def test_the_pool_lets_in_the_user_of_its_producers():
    services = COMPOSE["services"]
    assert parse(services["pool"]["command"])["allow_users"] == (int(services["producer"]["user"].split(":")[0]),)
    user = CONTAINERS["producer"]["securityContext"]["runAsUser"]
    assert parse(CONTAINERS["pool"]["args"])["allow_users"] == (user,)
    assert CONTAINERS["pool"]["securityContext"]["runAsUser"] not in (0, user)


def test_they_share_the_run_directory_and_nothing_else():
    for service in COMPOSE["services"].values():
        assert f"run:{RUN}" in service["volumes"]
        assert not {"ipc", "pid", "shm_size", "privileged", "cap_add", "network"}.intersection(service)
        assert service["network_mode"] == "none"
    assert COMPOSE["services"]["producer"]["volumes"] == [f"run:{RUN}"]
    for container in CONTAINERS.values():
        assert {"name": "run", "mountPath": RUN} in container["volumeMounts"]
    assert len(CONTAINERS["producer"]["volumeMounts"]) == 1
    assert not {"hostPID", "hostIPC", "hostNetwork", "shareProcessNamespace"}.intersection(POD)
    assert f"TRTPOOL_RUN_DIR={RUN}/pool" in DOCKERFILE


def test_a_pod_and_a_service_have_the_time_to_drain():
    drain_s = parse(["start", "a.onnx"])["drain_timeout_s"]
    assert POD["terminationGracePeriodSeconds"] > drain_s
    assert int(COMPOSE["services"]["pool"]["stop_grace_period"].removesuffix("s")) > drain_s


def test_the_image_has_all_that_the_package_is_built_from():
    copied = [words.split() for words in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)]
    sources = {source for *some, _ in copied for source in some}
    assert {"pyproject.toml", "README.md", "LICENSE", ".src", "ipc", "broker", "workers"} <= sources
    assert all((ROOT / source).exists() for source in sources)
    assert "producer.py" in " ".join(COMPOSE["services"]["producer"]["entrypoint"])
    assert COMPOSE["services"]["producer"]["entrypoint"] == CONTAINERS["producer"]["command"]


def test_selectors_and_volumes_fit():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    volumes = {volume["name"] for volume in POD["volumes"]}
    used = {mount["name"] for container in POD["containers"] for mount in container["volumeMounts"]}
    assert used == volumes
