"""The words of `trtpool build`: what they become, and what is refused before anything starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtpool.broker import cli, cli_build, supervisor
from trtpool.ipc import errors
from trtpool.ipc.building import BUILD_FORMAT, BuildRequest, Line, PlanRecord, Progress
from trtpool.ipc.normalization import Normalization
from trtpool.ipc.settings import BuildSettings, PoolSettings, Profile

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch):
    """Runs ``trtpool build WORDS`` in this process; returns the exit code."""

    def call(*words: str | os.PathLike[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["trtpool", "build", *(os.fspath(word) for word in words)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        return int(raised.value.code or 0)

    return call


@pytest.fixture
def built(monkeypatch, tmp_path):
    """What would have been built: requests, with the environment of the child."""
    seen: list[tuple[BuildRequest, dict[str, str]]] = []

    def build_plan(request: BuildRequest, work: Path, env: dict[str, str], show: Any) -> PlanRecord:
        seen.append((request, env))
        assert work.parent == Path(request.output).parent
        show(Line(said="TensorRT 10"))
        for done in (0, 50, 120, 1000):
            show(Line(progress=Progress("Timing", done, 1000)))
        show(Line(progress=Progress("reading", 0, 0)))
        return PlanRecord(
            format=BUILD_FORMAT, trtpool="1", source=request.source.path, source_sha256="", flavour="rtx", version="1",
            gpu="", compute_capability="8.9", options=request.build, shapes={}, max_batch=64, tensors=(), seconds=12.34,
            built="", plan_bytes=3 << 20, plan_sha256="",
        )  # fmt: skip

    monkeypatch.setattr(cli_build, "build_plan", build_plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "det.onnx").touch()
    return seen


def test_defaults(run, built, tmp_path, capsys):
    assert run("det.onnx") == 0
    ((request, _),) = built
    assert request.source.path == str(tmp_path / "det.onnx")
    assert request.output == str(tmp_path / "det.plan")
    assert (request.build, request.flavour, request.shapes, request.max_batch) == (BuildSettings(), "", {}, 64)
    assert request.timing_cache == str(tmp_path / "cache" / "trtpool" / "timing")
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'det.plan'}: 3.0 MiB, built in 12.3 s\n"
    assert err.splitlines() == ["TensorRT 10", "12% Timing", "100% Timing"]


def test_all_options(run, built, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ["--fp16", "--io=uint8", "--io", "logits=float16", "--shapes=a=1:2:4", "--shapes", "b=2x3", "--flavour=rtx",
             "--workspace=1.5GiB", "--optimization-level=0", "--compute-capability=12.0", "--gpu=1",
             "-o", "there/x.plan"]  # fmt: skip
    assert run("det.onnx", *words) == 0
    ((request, env),) = built
    assert request.build == BuildSettings(
        fp16=True,
        io={"": "uint8", "logits": "fp16"},
        profiles={"a": Profile((1,), (2,), (4,)), "b": Profile((2, 3), (2, 3), (2, 3))},
        workspace_bytes=3 << 29,
        optimization_level=0,
        compute_capability="12.0",
    )
    assert (request.flavour, request.output) == ("rtx", str(tmp_path / "there" / "x.plan"))
    assert env["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("word", "name", "profile"),
    [
        ("x=1x3x8:2x3x8:4x3x8", "x", Profile((1, 3, 8), (2, 3, 8), (4, 3, 8))),
        ("input:0=1:32:64", "input:0", Profile((1,), (32,), (64,))),
        ("m:a=b=5", "m:a=b", Profile((5,), (5,), (5,))),
    ],
)
def test_shapes(word, name, profile, run, built):
    assert run("det.onnx", "--shapes", word) == 0
    assert built[0][0].build.profiles == {name: profile}


def test_shapes_of_one_input_again_are_further_profiles(run, built):
    words = ["--shapes=x=1:2:4", "--shapes=y=1:2:8", "--shapes=x=8:8:8", "--shapes=x=9:9:9"]
    assert run("det.onnx", *words) == 0
    build = built[0][0].build
    assert {name: profile.max for name, profile in build.profiles.items()} == {"x": (4,), "y": (8,)}
    assert [{name: profile.max for name, profile in more.items()} for more in build.more] == [{"x": (8,)}, {"x": (9,)}]


def test_formats(run, built):
    assert run("det.onnx", "--io=float16:chw16", "--io", "y:0=fp32") == 0
    assert built[0][0].build.io == {"": "fp16:chw16", "y:0": "fp32"}


@pytest.mark.parametrize(
    ("word", "name", "normalize"),
    [
        (
            "x=mean=0.485,0.456,0.406,std=0.229,0.224,0.225", "x",
            Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ),
        ("mean=0.5", "", Normalization(mean=(0.5,))),
        ("m:a=b=std=2,4,8,mean=1,2,3", "m:a=b", Normalization(mean=(1, 2, 3), std=(2, 4, 8))),
        ("mean=127.5,std=127.5,scale=1", "", Normalization(mean=(127.5,), std=(127.5,), scale=1.0)),
        ("mean=0,scale=1/510", "", Normalization(scale=1 / 510)),
        ("x=imagenet", "x", Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))),
        ("unit", "", Normalization()),
        ("none", "", Normalization(std=(1 / 255,))),
    ],
)  # fmt: skip
def test_normalisation(word, name, normalize, run, built):
    assert run("det.onnx", "--normalize", word) == 0
    assert built[0][0].build.normalize == {name: normalize}


def test_an_output_that_ends_in_onnx_is_the_changed_model(run, built, capsys):
    assert run("det.onnx", "-o", "new.onnx", "--normalize=unit") == 0
    ((request, _),) = built
    assert (request.onnx, Path(request.output).name, request.timing_cache) == (True, "new.onnx", "")
    assert "new.onnx: 3.0 MiB, written in 12.3 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "word",
    [
        "--shapes=x=1",
        "--workspace=1GiB",
        "--optimization-level=0",
        "--flavour=rtx",
        "--compute-capability=8.9",
        "--gpu=0",
    ],
)
def test_what_is_for_plans_is_refused_for_onnx_files(word, run, built, capsys):
    assert run("det.onnx", "-o", "new.onnx", "--normalize=unit", word) == errors.ConfigError.exit_code
    assert f"{word.split('=')[0]} is for a plan, and new.onnx is an ONNX file" in capsys.readouterr().err
    assert not built


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 4 << 30), ("512MB", 512 << 20), ("1k", 1024), ("77", 77), ("2 TiB", 2 << 40)]
)
def test_sizes(text, count, run, built):
    assert run("det.onnx", f"--workspace={text}") == 0
    assert built[0][0].build.workspace_bytes == count


@pytest.mark.parametrize(
    "word",
    [
        "--io=bf16", "--io=fp16:", "--io=x=fp16:nchw", "--io=x=", "--io=x=fp64",
        "--shapes=1x3:2x3:4x3", "--shapes=x=1:2", "--shapes=x=1x2:2:4",
        "--optimization-level=6", "--optimization-level=-1",
        "--shapes=x=", "--shapes=x=0", "--shapes=x=1xa", "--shapes=x=1x2,3", "--workspace=0", "--workspace=4QB",
        "--workspace=-1", "--workspace=9999999TiB", "--compute-capability=89", "--compute-capability=sm89",
        "--flavour=lean", "--normalize=x", "--normalize=x=mean=", "--normalize=mean=1,mean=2",
        "--normalize=mean=0.5std=2",
        "--normalize=scale=1", "--normalize=mean=0,scale=1,2", "--normalize=std=0", "--normalize=mean=1,2,std=1,2,3",
        "--normalize=mean=0,scale=1/0", "--normalize=mean=nan",
    ],
)  # fmt: skip
def test_what_it_does_not_understand_is_one_line(word, run, built, capsys):
    assert run("det.onnx", word) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("see `trtpool build --help`")
    assert built == []


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["det.onnx", "-o", "det.onnx"], errors.ConfigError, "name a file of its own with -o"),
        (["det.onnx", "-o", "."], errors.ConfigError, "name a file of its own with -o"),
        (["old.plan"], errors.ModelError, "is a plan already; name the ONNX file"),
        (["det.onnx", "--gpu=0;1"], errors.ConfigError, "such as 0,1"),
    ],
)
def test_what_is_refused_before_anything_starts(words, error, text, run, built, capsys):
    assert run(*words) == error.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert built == []


def test_help_has_examples(run, capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "trtpool build resnet50.onnx --fp16 --io uint8 --shapes images=1:32:64\n" in out


def test_a_pool_takes_the_same_options(monkeypatch, run, built, tmp_path):
    started: list[PoolSettings] = []

    def start(settings: PoolSettings, *_: object) -> int:
        started.append(settings)
        return 0

    monkeypatch.setattr(supervisor, "run", start)
    words = ["--gpus=0", "--fp16", "--io=x=uint8", "--shapes=x=1:2:4", "--workspace=1GiB",
             "--optimization-level=5", f"--run-dir={tmp_path}"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["trtpool", "start", "det.onnx", *words])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 0
    profiles = {"x": Profile((1,), (2,), (4,))}
    assert started[0].build == BuildSettings(
        fp16=True, io={"x": "uint8"}, profiles=profiles, workspace_bytes=1 << 30, optimization_level=5
    )
