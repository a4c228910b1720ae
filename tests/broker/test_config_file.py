"""`trtpool start --config`: what a file says, what the command line says of it, and which line is wrong."""

from __future__ import annotations

import os
import pwd
import textwrap
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tests.broker.test_cli import Run, only_line, run, started
from trtpool.broker import cli, config_file
from trtpool.ipc.errors import ConfigError
from trtpool.ipc.normalization import Normalization
from trtpool.ipc.settings import BuildSettings, EngineSettings, ModelSource, ModelTerms, PoolSettings, Profile

__all__ = ["run", "started"]  # fixtures

Start = Callable[..., PoolSettings]


@pytest.fixture
def start(run: Run, started: list[PoolSettings], tmp_path: Path) -> Start:
    """Starts with a file of some text, and with further words; returns the settings."""
    for name in ("det", "rec"):
        (tmp_path / f"{name}.onnx").touch()

    def call(text: str, *words: str) -> PoolSettings:
        (tmp_path / "pool.toml").write_text(textwrap.dedent(text))
        assert run("start", "--config", tmp_path / "pool.toml", *words) == 0
        return started[-1]

    return call


@pytest.fixture
def refused(
    run: Run, started: list[PoolSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What is said of a file that is not possible, after its name."""

    def call(text: str, *words: str) -> str:
        path = tmp_path / "pool.toml"
        path.write_text(textwrap.dedent(text))
        assert run("start", "--config", path, *words) == ConfigError.exit_code
        assert started == []
        return only_line(capsys).removeprefix(f"trtpool: {path}")

    return call


TWO = """\
    slots = 64
    max_delay_us = 100

    [models.det]
    path = "det.onnx"
    slots = 32
    weight = 3
    shape = { x = [3, 640, 640] }

    [models.rec]
    path = "rec.onnx"
    max-batch = 16
    shape = { x = [3, 48, [32, 640]] }
"""


def test_models_with_settings_of_their_own(start, tmp_path):
    settings = start(TWO)
    assert settings.models == tuple(ModelSource(str(tmp_path / f"{name}.onnx"), name) for name in ("det", "rec"))
    assert [settings.for_model(name).slots for name in ("det", "rec")] == [32, 64]
    assert [settings.for_model(name).max_batch for name in ("det", "rec")] == [0, 16]
    assert [settings.terms_of(name) for name in ("det", "rec")] == [ModelTerms(100, 0, 3), ModelTerms(100, 0, 1)]
    assert settings.engine.shapes == {"det:x": (3, 640, 640), "rec:x": (3, 48, (32, 640))}


def test_a_file_can_say_all_that_the_command_line_can(start, tmp_path, monkeypatch):
    for name in ("TRTPOOL_LOG", "TRTPOOL_LOG_FORMAT"):
        monkeypatch.setenv(name, "")
    settings = start(
        """\
        name = "ocr"
        run-dir = "run"
        gpus = [0, "GPU-8f3a-1"]
        device = "gpu"
        workers-per-gpu = 2
        lanes = 4
        flavour = "rtx"
        graphs = false
        allow-host-code = true
        huge-pages = true
        allow-user = [4321, "daemon"]
        drain-timeout-s = 1.5
        batch-timeout-s = 2
        start-timeout-s = 3
        recall-timeout-s = 4
        evict = true
        busy-poll = true
        spin-us = 77
        max-slots-per-producer = 9
        items-per-slot = 2
        fp16 = true
        workspace = "4GiB"
        optimization-level = 1
        io = "fp16"
        no-batch = ["det"]
        partial-batches = "refuse"
        slow-ms = 2.5
        metrics = "127.0.0.1:9400"
        log-level = "info"
        log-format = "json"
        [models.det]
        path = "det.onnx"
        io = { x = "uint8" }
        normalize = { x = "mean=0.5,std=0.25" }
        shapes = { x = "1:32:64" }
        """
    )
    assert (settings.name, settings.run_dir) == ("ocr", str(tmp_path / "run"))
    assert (settings.gpus, settings.workers_per_gpu) == (("0", "GPU-8f3a-1"), 2)
    assert settings.engine == EngineSettings(
        "gpu", lanes=4, flavour="rtx", graphs=False, host_code=True, no_batch=("det",), partial="refuse"
    )
    assert (settings.slow_ms, settings.metrics) == (2.5, "127.0.0.1:9400")
    assert (os.environ["TRTPOOL_LOG"], os.environ["TRTPOOL_LOG_FORMAT"]) == ("info", "json")
    assert (settings.huge_pages, settings.evict, settings.busy_poll, settings.spin_us) == (True, True, True, 77)
    assert settings.allow_users == (4321, pwd.getpwnam("daemon").pw_uid)
    assert (settings.drain_timeout_s, settings.batch_timeout_s) == (1.5, 2.0)
    assert (settings.start_timeout_s, settings.recall_timeout_s) == (3.0, 4.0)
    assert (settings.max_slots_per_producer, settings.items_per_slot) == (9, 2)
    profiles = {"det:x": Profile((1,), (32,), (64,))}
    assert settings.build == BuildSettings(
        fp16=True,
        io={"": "fp16", "det:x": "uint8"},
        normalize={"det:x": Normalization(mean=(0.5,), std=(0.25,))},
        profiles=profiles,
        workspace_bytes=4 << 30,
        optimization_level=1,
    )
    # The rest are for the CPU; were there an option that this test forgot, it would not be said here.
    said = set(config_file.options_of(cli.start)) - {"workers", "threads"}
    inside = {"shape", "slots", "max-batch", "max-delay-us", "weight"}  # in the test before
    assert len(said - inside) == 32


def test_a_file_for_the_cpu(start):
    settings = start('workers = 2\nthreads = 3\nmodels = { det = { path = "det.onnx" } }\n')
    assert (settings.workers, settings.engine.threads) == (2, 3)


def test_a_file_that_says_nothing_changes_nothing(start, tmp_path):
    settings = start("", str(tmp_path / "det.onnx"), "--run-dir", str(tmp_path))
    assert settings == PoolSettings(models=(ModelSource(str(tmp_path / "det.onnx"), "det"),), run_dir=str(tmp_path))


def test_the_command_line_goes_before_the_file(start, tmp_path):
    words = ["--slots=det=5", "--max-delay-us=7", f"rec={tmp_path}/det.onnx", f"new={tmp_path}/rec.onnx", "--no-evict"]
    settings = start("evict = true\n" + textwrap.dedent(TWO), *words)
    assert [settings.for_model(name).slots for name in ("det", "rec", "new")] == [5, 64, 64]
    assert settings.terms_of("det").max_delay_us == 7
    assert not settings.evict
    assert [Path(model.path).name for model in settings.models] == ["det.onnx", "det.onnx", "rec.onnx"]


def test_what_the_command_line_says_for_all_is_for_all(start):
    settings = start(TWO, "--slots=8")
    assert [settings.for_model(name).slots for name in ("det", "rec")] == [8, 8]


MODEL = '[models.det]\npath = "det.onnx"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slots = = 3\n", " is no TOML: Invalid value (at line 1, column 9)"),
        ("a = 1\na = 2\n", " is no TOML: Cannot overwrite a value (at line 2, column 6)"),
        ("\n# x\nslotz = 3\n", ", line 3: slotz is no option of `trtpool start`, did you mean 'slots'?; there are "),
        ("slots = 3\nmax_batch = 'many'\n", ", line 2: max_batch must be a number, not 'many'"),
        ("slots = [\n  1,\n  true,\n]\n", ", line 1: slots must be a number, not true"),
        ("slots = 0\n", ", line 1: slots is not possible: 0 is not in the range 1<=x<=16777216"),
        ("slots = 1.5\n", ", line 1: slots is not possible: '1.5' is not a valid integer"),
        ("drain-timeout-s = -1\n", ", line 1: drain-timeout-s is not possible: -1.0 is not in the range 0<=x<=86400"),
        ("evict = 1\n", ", line 1: evict must be true or false, not 1"),
        ("name = 2024-01-01\n", ", line 1: name must be a string, not datetime.date(2024, 1, 1)"),
        ("lanes = { det = 3 }\n", ", line 1: lanes must be a number, not a table"),
        ("flavour = 'trt'\n", ", line 1: flavour is not possible: 'trt' is not one of"),
        ("weight = 3\n", ", line 1: weight is not possible: say of which model"),
        ("models = 3\n", ", line 1: models must be tables, one for each model"),
        ("[models]\ndet = 'det.onnx'\n", ", line 2: models.det must be a table, such as [models.det] with path"),
        ("\n[models.det]\nslots = 3\n", ', line 2: models.det needs a file, such as path = "model.onnx"'),
        ("[models.det]\npath = 3\n", ", line 2: models.det.path needs a file"),
        (f"{MODEL}slots = 'x'\n", ", line 3: models.det.slots must be a number, not 'x'"),
        (f"{MODEL}slots = 1\n\n[models.rec]\npath = 'r'\nslots = 0\n", ", line 7: models.rec.slots is not possible"),
        (f"{MODEL}allow-user = 3\n", ", line 3: models.det.allow-user is no option of a model; there are io, items"),
        ('[models."a=b"]\npath = "x"\n', ", line 1: models.a=b is no name for a model"),
        (f"{MODEL}lanes = 2\n", ", line 3: models.det.lanes is no option of a model; there are "),
        (f"{MODEL}shape = {{ x = [3, -1] }}\n", ", line 3: models.det.shape is not possible: 'det:x=3x-1' "),
        ('slots = 4\ntext = """\nslots = 3\n"""\n', ", line 2: text is no option of"),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_one_line_with_its_number(text, words, refused):
    said = refused(text)
    assert said.startswith(words), said


def test_a_file_that_is_not_there(run, tmp_path, capsys):
    assert run("start", "--config", tmp_path / "no.toml") == ConfigError.exit_code
    assert "no.toml cannot be read: " in only_line(capsys)


def test_two_models_of_one_name_on_the_command_line_are_not_hidden_by_a_file(refused):
    assert "two models are called 'det'" in refused(MODEL, "det=a.onnx", "det=b.onnx")


def test_each_option_is_called_as_on_the_command_line():
    names = set(config_file.options_of(cli.start))
    assert {"slots", "max-batch", "gpus", "fp16", "weight", "shape", "allow-user", "graphs"} <= names
    assert not names & {"config", "help", "models", "no-graphs"}
    assert isinstance(cli.start, click.Command)
