"""`python -m trtpool.workers.devices` as `start` calls it: one line of JSON out, about the one GPU that it sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.workers import fake_bindings as fake
from trtpool.ipc.settings import GpuInfo, Refusal

pytestmark = pytest.mark.system


def ask(folder: Path, visible: str, machine: dict[str, str]) -> dict[str, Any]:
    """What it answers when it sees `visible`; its exit code must be 0."""
    places = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    ended = subprocess.run(
        [sys.executable, "-m", "trtpool.workers.devices"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **fake.on_path(folder), **places, **machine},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.count(b"\n") == 1
    return msgspec.json.decode(ended.stdout, type=dict[str, Any])


def refusal(folder: Path, machine: dict[str, str], visible: str = "0") -> Refusal:
    answer = ask(folder, visible, machine)
    assert [*answer] == ["refusal"]
    return msgspec.convert(answer["refusal"], Refusal)


@pytest.mark.parametrize("v2", [False, True], ids=["CUDA 13", "CUDA 12"])
def test_a_gpu_is_described(v2, tmp_path):
    fake.make(tmp_path, v2=v2)
    first = "print('printed'); os.write(1, b'written by native code')"  # not part of the answer
    answer = ask(tmp_path, "1", fake.machine({"0": fake.gpu(0), "1": fake.gpu(1)}, driver=12090, first=first))
    assert [*answer] == ["gpu"]
    assert msgspec.convert(answer["gpu"], GpuInfo) == GpuInfo(
        name="NVIDIA H100 80GB HBM3",
        uuid=f"GPU-{fake.uuid_of(1)}",
        pci_bus_id="0000:18:00.0",
        compute_capability="9.0",
        memory_bytes=85_000_000_000,
        driver=(12, 9),
    )


def test_a_mig_instance_has_an_id_of_its_own(tmp_path):
    fake.make(tmp_path)
    mig = fake.gpu(5, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert ask(tmp_path, "MIG-5", fake.machine({"MIG-5": mig}))["gpu"]["uuid"] == f"MIG-{fake.uuid_of(5)}"


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (fake.machine({}, driver=0, error=35), r"there is no NVIDIA driver here \(libcuda.so.1\); install one"),
        (
            fake.machine({}, driver=12020, error=35),
            r"the NVIDIA driver runs CUDA 12.2 at most, .* 13.0; update the driver or pip install 'trtpool\[cu12\]'$",
        ),
        (fake.machine({}, driver=12020, runtime=12090, error=35), r".* needs 12.9; update the driver$"),
        (fake.machine({}, driver=11040, error=35), r".* needs 13.0; update the driver$"),
        (fake.machine({"0": fake.gpu(0)}), r"CUDA finds no GPU 7 here; `nvidia-smi -L` lists those there are"),
        (fake.machine({}, error=100), r"CUDA finds no GPU 7 here"),
        (
            fake.machine({}, error=802),
            r"CUDA cannot use the GPU \(cudaErrorSystemNotReady, error 802\); .*start nvidia-fabricmanager$",
        ),
        (
            fake.machine({"7": fake.gpu(7, properties_error=999)}),
            r"CUDA cannot use the GPU \(cudaErrorUnknown, error 999\); see nvidia-smi",
        ),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_in_one_sentence(machine, words, tmp_path):
    fake.make(tmp_path)
    answer = refusal(tmp_path, machine, "7")
    assert answer.kind == "DeviceUnavailable"
    assert re.match(words, answer.text), answer.text
    assert "\n" not in answer.text


def test_without_cuda_python_it_says_what_to_install(tmp_path):
    (tmp_path / "cuda.py").write_text("raise ImportError('not here')\n")
    answer = refusal(tmp_path, {})
    assert answer.kind == "MissingExtra"
    assert "(not here)" in answer.text
    assert answer.text.endswith("pip install 'trtpool[cu13]' or 'trtpool[cu12]'")


@pytest.mark.gpu
def test_the_real_gpu(monkeypatch):
    pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    ended = subprocess.run([sys.executable, "-m", "trtpool.workers.devices"], stdout=subprocess.PIPE, check=True)
    gpu = msgspec.convert(msgspec.json.decode(ended.stdout)["gpu"], GpuInfo)
    query = ["nvidia-smi", "--id=0", "--query-gpu=name,uuid,pci.bus_id,compute_cap", "--format=csv,noheader"]
    name, uuid, bus, capability = (
        subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    )
    assert (gpu.name, gpu.uuid, gpu.compute_capability) == (name, uuid, capability)
    assert bus.lower().endswith(gpu.pci_bus_id.lower())
    assert gpu.memory_bytes > 1 << 30
