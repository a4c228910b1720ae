"""The command line as a function of its words: what it makes of options, what it prints, what it exits with."""

from __future__ import annotations

import inspect
import os
import pwd
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import trtpool
from trtpool.broker import cli, supervisor
from trtpool.ipc import errors, rundir
from trtpool.ipc.layout import ModelPlan, plan
from trtpool.ipc.report import ClassReport, HolderReport, ModelReport, PoolReport, WorkerReport
from trtpool.ipc.settings import EngineSettings, GpuInfo, ModelSource, ModelTerms, PoolSettings
from trtpool.ipc.tensors import ModelSpec, TensorSpec

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``trtpool WORDS`` in this process; returns the exit code."""

    def call(*words: str | os.PathLike[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["trtpool", *(os.fspath(word) for word in words)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        return int(raised.value.code or 0)

    return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[PoolSettings]:
    """The settings of pools that would have been started."""
    seen: list[PoolSettings] = []

    def run(settings: PoolSettings, announce: Callable[[supervisor.Started], None], say: Callable[[str], None]) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(supervisor, "run", run)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "det.onnx").touch()
    return tmp_path / "det.onnx"


# --- Help ----------------------------------------------------------------------------------------


def test_help_has_examples_and_exit_codes(run, capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "trtpool start det.onnx --shape x=3x640x640 --workers 2 --max-batch 4\n" in text
    listed = re.search(r"Exit codes:\n(.*)", text, re.DOTALL)
    assert listed is not None
    codes = [int(number) for number in re.findall(r"^ +(\d+)  ", listed[1], re.MULTILINE)]
    assert codes == sorted(set(codes))
    assert codes == [code for code, _ in cli._CODES]


def test_every_error_that_a_command_can_end_with_is_in_the_table():
    listed = {code for code, _ in cli._CODES}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TrtpoolError)]
    # Nobody but a program that uses the client meets these.
    program = (errors.UsageError, errors.WorkError)
    missing = [kind for kind in kinds if not issubclass(kind, program) and kind.exit_code not in listed]
    assert missing == [errors.PoolError]  # the base, which nothing raises


@pytest.mark.parametrize("command", ["start", "status", "stop"])
def test_each_command_has_help(command, run, capsys):
    assert run(command, "-h") == 0
    assert f"Usage: trtpool {command}" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(run, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"trtpool, version {trtpool.__version__}\n"


# --- Options -------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_settings(run, started, model, tmp_path):
    assert run("start", model, "--run-dir", tmp_path / "run") == 0
    (settings,) = started
    assert settings == PoolSettings(models=(ModelSource(str(model), "det"),), run_dir=str(tmp_path / "run"))


def test_every_option_reaches_the_settings(run, started, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {
        "slots": 9, "items_per_slot": 3, "max_batch": 6, "max_delay_us": 70,
        "max_slots_per_producer": 4, "drain_timeout_s": 1.5,
        "batch_timeout_s": 2.5, "start_timeout_s": 3.5, "recall_timeout_s": 4.5, "slow_ms": 5.5,
        "metrics": "127.0.0.1:9400", "spin_us": 7,
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    words += ["--workers=2", "--threads=5", "--shape=a:x=3x4", "--shape=b:z=7", "--name=ocr", "--run-dir=there"]
    words += ["--huge-pages", "--evict", "--busy-poll", "--allow-user=4321", "--allow-user=daemon"]
    assert run("start", "a=det.onnx", "b=./det.onnx", *words) == 0
    (settings,) = started
    assert settings.models == (ModelSource(str(model), "a"), ModelSource(str(model), "b"))
    assert (settings.name, settings.run_dir) == ("ocr", str(tmp_path / "there"))
    assert settings.engine == EngineSettings(threads=5, shapes={"a:x": (3, 4), "b:z": (7,)})
    assert (settings.workers, settings.huge_pages, settings.evict, settings.busy_poll) == (2, True, True, True)
    assert settings.gpus == ()
    assert settings.allow_users == (4321, pwd.getpwnam("daemon").pw_uid)
    assert {name: getattr(settings, name) for name in options} == options
    # Were there an option that this test and the next forgot, it would have its default.
    others = {"models", "name", "run_dir", "engine", "workers", "huge_pages", "gpus", "workers_per_gpu", "build"}
    others |= {"allow_users", "busy_poll", "evict", "per_model"}
    assert {field.name for field in msgspec.structs.fields(PoolSettings)} == {*options, *others}


def test_options_of_one_model_go_before_those_of_all(run, started, model, tmp_path):
    words = [
        "--slots=det=32",
        "--slots=7",
        "--slots=rec=512",
        "--max-delay-us=det=0",
        "--max-delay-us=90",
        "--weight=det=3",
    ]
    words += ["--items-per-slot=rec=4", "--max-batch=rec=16", "--max-slots-per-producer=det=5", "--slots=det=33"]
    assert run("start", model, f"rec={model}", f"cls={model}", "--run-dir", tmp_path, *words) == 0
    (settings,) = started
    own = [settings.for_model(name) for name in ("det", "rec", "cls")]
    assert [one.slots for one in own] == [33, 512, 7], "the last word counts"
    assert [one.max_batch for one in own] == [0, 16, 0]
    assert [one.items_per_slot for one in own] == [1, 4, 1]
    terms = [settings.terms_of(name) for name in ("det", "rec", "cls")]
    assert terms == [ModelTerms(0, 5, 3), ModelTerms(90, 0, 1), ModelTerms(90, 0, 1)]


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--slots=dett=3"], 3, "no model is called 'dett', for which settings are given; there are det"),
        (["--slots=det=0"], 2, "0 is not in the range 1<=x<="),
        (["--slots=det=many"], 2, "'many' is not a valid integer"),
        (["--weight=3"], 2, "say of which model, such as det=3"),
        (["--weight=det=0"], 2, "0 is not in the range 1<=x<=1000"),
        (
            ["--max-batch=det=2", "--items-per-slot=3"],
            3,
            "model 'det': --max-batch 2 is smaller than --items-per-slot 3",
        ),
        (["--lanes=det=2"], 2, "'det=2' is not a valid integer"),
    ],
)
def test_what_is_not_possible_for_one_model_is_one_line(words, code, line, run, started, model, capsys):
    assert run("start", model, *words) == code
    assert line in only_line(capsys)
    assert started == []


def test_two_models_of_one_name_are_named_with_their_files(run, started, model, capsys, tmp_path):
    assert run("start", model, f"det={tmp_path / 'other.onnx'}") == errors.ConfigError.exit_code
    assert f"two models are called 'det', {model} and {tmp_path / 'other.onnx'}; name them with" in only_line(capsys)
    assert started == []


def test_every_option_for_gpus_reaches_the_settings(run, started, model, tmp_path):
    words = ["--gpus= 1,GPU-8f3a-1", "--workers-per-gpu=2", "--lanes=5", "--flavour=rtx", "--no-graphs"]
    assert run("start", model, "--run-dir", tmp_path, *words, "--allow-host-code") == 0
    (settings,) = started
    assert (settings.gpus, settings.workers_per_gpu, settings.workers) == (("1", "GPU-8f3a-1"), 2, 1)
    assert settings.engine == EngineSettings(device="gpu", lanes=5, flavour="rtx", graphs=False, host_code=True)


def test_how_to_log_is_passed_on_to_children(run, started, model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRTPOOL_LOG", "error")  # which is put back at the end
    monkeypatch.setenv("TRTPOOL_LOG_FORMAT", "text")
    assert run("start", model, "--run-dir", tmp_path, "--log-level=debug") == 0
    assert (os.environ["TRTPOOL_LOG"], os.environ["TRTPOOL_LOG_FORMAT"]) == ("debug", "text")
    assert run("start", model, "--run-dir", tmp_path, "--log-format=json") == 0
    assert (os.environ["TRTPOOL_LOG"], os.environ["TRTPOOL_LOG_FORMAT"]) == ("debug", "json")
    assert run("start", model, "--log-level=loud") == 2


def test_gpus_alone_imply_the_device(run, started, model, tmp_path):
    assert run("start", model, "--run-dir", tmp_path, "--gpus=0", "--device=gpu") == 0
    assert run("start", model, "--run-dir", tmp_path, "--gpus=0") == 0
    assert started[0] == started[1]
    assert started[0].engine == EngineSettings(device="gpu")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus=0", "--workers=2"], "as many as --workers-per-gpu says"),
        (["--gpus=0", "--workers=1"], "as many as --workers-per-gpu says"),
        (["--gpus=0", "--device=cpu"], "--device cpu and --gpus contradict each other"),
        (["--gpus=0", "--threads=2"], "--threads 2 is for the CPU; leave it out"),
        (["--device=gpu"], "name the GPUs to use, such as --gpus 0"),
        (["--workers-per-gpu=2"], "--workers-per-gpu is for GPUs: name those to use, such as --gpus 0"),
        (["--lanes=2"], "--lanes is for GPUs"),
        (["--flavour=lean"], "--flavour is for GPUs"),
        (["--no-graphs"], "--no-graphs is for GPUs"),
        (["--allow-host-code"], "--allow-host-code is for GPUs"),
    ],
)
def test_what_is_for_another_device_is_refused(words, line, run, started, model, capsys):
    assert run("start", model, *words) == errors.ConfigError.exit_code == 3
    assert line in only_line(capsys)
    assert started == []


def test_a_device_that_does_not_exist(run, started, model, capsys):
    assert run("start", model, "--device=tpu") == errors.DeviceUnavailable.exit_code == 8
    assert only_line(capsys).endswith("there is no device 'tpu'; use --device cpu, or name GPUs, such as --gpus 0")


@pytest.mark.parametrize(
    ("word", "name", "shape"),
    [
        ("x=3x640x640", "x", (3, 640, 640)),
        ("x=7", "x", (7,)),
        ("x=", "x", ()),  # a number per item
        ("det:x=2x2", "det:x", (2, 2)),
        ("a=b=4", "a=b", (4,)),  # a name may have what it likes
        ("x=3x32..640x7..7", "x", (3, (32, 640), (7, 7))),
    ],
)
def test_shapes(word, name, shape, run, started, model, tmp_path):
    assert run("start", model, "--run-dir", tmp_path / "run", "--shape", word) == 0
    assert started[0].engine.shapes == {name: shape}


NO_SHAPES = ["x", "3x4", "x=3x", "x=ax4", "x=0", "x=-1x2", "x=3,4", "x=1.5", "=3"]
NO_RANGES = ["x=3..", "x=..3", "x=4..3", "x=0..3", "x=1..2..3", "x=3...4"]


@pytest.mark.parametrize("word", NO_SHAPES + NO_RANGES)
def test_what_is_no_shape(word, run, started, model, capsys):
    assert run("start", model, "--shape", word) == 2
    assert "is not NAME=3x640x640" in only_line(capsys)
    assert started == []


def test_models_without_a_batch_and_with_one_size(run, started, model, tmp_path):
    words = ["--no-batch=a", "--no-batch=b", "--partial-batches=refuse", "--run-dir", tmp_path / "run"]
    assert run("start", f"a={model}", f"b={model}", *words) == 0
    assert (started[0].engine.no_batch, started[0].engine.partial) == (("a", "b"), "refuse")


@pytest.mark.parametrize(
    "word", ["", "a", "0,", "0,0", "0,00", "-1", "0;1", "gpu0", "0, ,1", "1000", "GPU-", "GPU-a b"]
)
def test_what_is_no_list_of_gpus(word, run, started, model, capsys):
    assert run("start", model, "--gpus", word) == 2
    assert "is not a list of different GPUs" in only_line(capsys)


# --- Errors --------------------------------------------------------------------------------------


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error, with nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("trtpool: ")
    return line


@pytest.mark.parametrize(
    "error",
    [
        errors.NameInUse("taken; choose another"), errors.ArenaTooLarge("less"), errors.StartFailed("see above"),
        errors.PoolClosed("the broker ended"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_its_code(error, run, model, monkeypatch, capsys):
    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr(supervisor, "run", fail)
    assert run("start", model) == error.exit_code
    assert only_line(capsys) == f"trtpool: {error}"


@pytest.mark.parametrize(
    "words",
    [["start"], ["begin"], ["start", "x.onnx", "--nonsense"], ["status", "extra"], ["stop", "--timeout-s=-1"],
     ["start", "x.onnx", "--workers=0"], ["start", "x.onnx", "--max-batch=many"]],
    ids=" ".join,
)  # fmt: skip
def test_what_it_does_not_understand_is_one_line(words, run, capsys):
    assert run(*words) == 2
    assert re.search(r"; see `trtpool( start| status| stop)? --help`$", only_line(capsys))


def test_the_code_of_the_pool_is_that_of_the_command(run, model, monkeypatch):
    monkeypatch.setattr(supervisor, "run", lambda *_: 1)
    assert run("start", model) == 1


# --- Words for people ----------------------------------------------------------------------------


def test_the_announcement(capsys):
    spec = ModelSpec("det", "/m", (TensorSpec("x", "uint8", (3, 4)),), (TensorSpec("y", "float32", ()),))
    layout = plan([ModelPlan(spec, 16, 2, 8)])
    model = "model det: x uint8 (N, 3, 4) -> y float32 (N); 16 slots of 32 B, batches of up to 8\n"
    cli._announce(supervisor.Started("ocr", Path("/run/ocr"), layout, 2))
    assert capsys.readouterr().out == (
        model + "ready: pool 'ocr' with 2 workers on the CPU, arena 8.0 KiB, in /run/ocr\n"
    )
    gpus = tuple(
        GpuInfo(
            name=f"NVIDIA H{number}00",
            uuid=f"GPU-{number}",
            pci_bus_id="0000:17:00.0",
            compute_capability="9.0",
            memory_bytes=80 << 30,
            driver=(13, 0),
        )
        for number in (1, 2)
    )
    cli._announce(supervisor.Started("ocr", Path("/run/ocr"), layout, 4, gpus))
    assert capsys.readouterr().out == (
        model + "GPU 0: NVIDIA H100 (GPU-1), 2 workers\n"
        "GPU 1: NVIDIA H200 (GPU-2), 2 workers\n"
        "ready: pool 'ocr' with 4 workers on 2 GPUs, arena 8.0 KiB, in /run/ocr\n"
    )
    cli._announce(supervisor.Started("ocr", Path("/run/ocr"), layout, 1, gpus[:1]))
    assert "GPU 0: NVIDIA H100 (GPU-1), 1 worker\nready: pool 'ocr' with 1 worker on 1 GPU," in capsys.readouterr().out


def report(**changed: Any) -> PoolReport:
    counts: dict[str, Any] = {field.name: 0 for field in msgspec.structs.fields(ModelReport) if field.type is int}
    counts |= {"name": "det", "interactive": ClassReport(1, 2, 3, 9000), "bulk": ClassReport(0, 0, 0, 0)}
    model = ModelReport(**{**counts, "slots": 16, "free": 16, "slot_bytes": 1536, "max_batch": 8, **changed})
    holders = HolderReport(4321, "det", 1, 2, 3, 4, 31.4, True), HolderReport(0, "det", 1, 0, 0, 0, 0.5, False)
    return PoolReport("ocr", 1, 61.4, 3 << 20, 2, 3, False, (WorkerReport(77, "cpu", 1, 1),), (model,), holders)


class Connected:
    """In place of a client."""

    def __init__(self, answer: PoolReport) -> None:
        self.answer = answer

    def __enter__(self) -> Connected:
        return self

    def __exit__(self, *_: object) -> None: ...

    def status(self) -> PoolReport:
        return self.answer


@pytest.fixture
def status(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What ``trtpool status`` prints of a report."""

    def show(answer: PoolReport, *words: str) -> str:
        monkeypatch.setattr(cli, "connect", lambda name, *, run_dir: Connected(answer))
        monkeypatch.setenv("COLUMNS", "200")
        assert run("status", *words) == 0
        return capsys.readouterr().out

    return show


def test_the_status_of_a_pool_that_did_nothing_yet(status):
    text = status(report())
    assert "pool ocr: serving for 61 s, arena 3.0 MiB, 2 clients, 3 protocol violations" in text
    assert "worker 77 on cpu: 1 batches in flight" in text
    assert re.search(r"now +│ 16 free, 0 leased, 0 queued, 0 running, 0 done", text)
    assert re.search(r"compute +│ - us a batch", text)


def test_the_status_tells_the_classes_and_who_holds_what(status):
    text = status(report(overdue=5, evicted=1))
    assert re.search(r"of which interactive +│ 3\.0 us an item; 1 queued, 3 done, 2 leases waiting", text)
    assert re.search(r"of which bulk +│ - us an item; 0 queued, 0 done, 0 leases waiting", text)
    assert re.search(r"recalls overdue / evicted +│ 5 / 1", text)
    assert (
        "process 4321 holds of det 1 leased, 2 queued, 3 running, 4 done; idle for 31.4 s, OVERDUE: others wait\n"
        "process ? holds of det 1 leased, 0 queued, 0 running, 0 done; idle for 0.5 s\n"
    ) in text


def test_the_status_has_means(status):
    text = status(report(items=3000, batches=1000, runs=1500, queue_ns=6_000_000, compute_ns=2_500_000_000))
    assert re.search(r"items done / failed +│ 3,000 / 0", text)
    assert re.search(r"items a batch +│ 3\.0 of at most 8", text)
    assert re.search(r"runs a batch +│ 1\.5", text)
    assert re.search(r"in the queue +│ 2\.0 us an item", text)
    assert re.search(r"compute +│ 2,500\.0 us a batch", text)


def test_the_status_as_json_is_the_report(status):
    whole = report(items=7)
    assert msgspec.json.decode(status(whole, "--json"), type=PoolReport) == whole


def test_stop_says_what_has_ended(run, monkeypatch, capsys, tmp_path):
    asked = []

    def stop(path: Path, timeout_s: float) -> bool:
        asked.append((path, timeout_s))
        return timeout_s > 1

    monkeypatch.setattr(rundir, "stop", stop)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TRTPOOL_RUN_DIR", raising=False)
    assert run("stop", "--name=ocr") == 0
    assert capsys.readouterr().out == "pool 'ocr' has ended\n"
    assert run("stop", "--run-dir=/there", "--timeout-s=0.5") == errors.PoolBusy.exit_code
    assert "still drains after 0.5 s; wait, or run `trtpool stop` again" in only_line(capsys)
    assert asked == [(tmp_path / "trtpool" / "ocr", 60.0), (Path("/there"), 0.5)]
