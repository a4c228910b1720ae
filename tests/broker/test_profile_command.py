"""The words of `trtpool profile`: what is asked, what is printed, and the report as a page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.broker.profile_figures import batch, bus, cpu, gpu, model, overlaps, phases
from trtpool.broker import building, cli
from trtpool.broker.profiling import command
from trtpool.broker.profiling.advice import Advice, judge
from trtpool.broker.profiling.page import page
from trtpool.broker.profiling.plots import Bar, Part, bars
from trtpool.ipc.errors import ModelError
from trtpool.ipc.profiling import Measured, Overlap, ProfileRequest
from trtpool.ipc.settings import BuildSettings, EngineSettings, GpuInfo, ModelSource, PoolSettings

Run = Callable[..., int]

ON_GPU = gpu(
    batch(
        8, phases(0.1, 1, 2, 1), graph=True, overlaps=overlaps(4, 3, 2, 1.9), plain=phases(1, 1, 2, 1),
        plain_overlap=Overlap(4, 100, 500_000_000), pageable=phases(5, 4, 2, 4),
    ),
    batch(64, phases(0.1, 8, 2, 1, deviation=0.2), graph=True, overlaps=overlaps(11, 9, 8, 8)),
)  # fmt: skip
INTERRUPTED = """
import signal, sys
from trtpool.broker.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.argv.insert(1, "profile")
main()
"""

ON_CPU = cpu(batch(1, phases(0.01, 0, 1, 0), one_thread=phases(0.01, 0, 3, 0)))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs ``trtpool profile WORDS`` in this process; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "det.onnx").touch()
    (tmp_path / "det.plan").touch()

    def call(*words: str | os.PathLike[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["trtpool", "profile", *(os.fspath(word) for word in words)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        return int(raised.value.code or 0)

    return call


@pytest.fixture
def asked(monkeypatch):
    """What a child would have been asked, with its environment; it answers `ON_GPU` or `ON_CPU`."""
    seen: list[tuple[ProfileRequest, dict[str, str]]] = []

    def ask(request: ProfileRequest, env: dict[str, str], say: Callable[[str], None]) -> Measured:
        seen.append((request, env))
        say("measuring")
        return ON_GPU if request.engine.device == "gpu" else ON_CPU

    def probe(gpus: tuple[str, ...]) -> list[GpuInfo]:
        info = GpuInfo(
            name="H100", uuid="GPU-1", pci_bus_id="", compute_capability="9.0", memory_bytes=1, driver=(13, 0)
        )
        return [info for _ in gpus]

    monkeypatch.setattr(command, "ask", ask)
    monkeypatch.setattr(command, "probe", probe)
    return seen


# --- What is asked -------------------------------------------------------------------------------


def test_defaults(run, asked, tmp_path):
    assert run("det.onnx") == 0
    ((request, _),) = asked
    assert request == ProfileRequest(
        source=ModelSource(str(tmp_path / "det.onnx"), "det"), engine=EngineSettings(), batches=(1, 8, 32, 64),
        strict=False, seconds=1.0, cpus=len(os.sched_getaffinity(0)),
    )  # fmt: skip


def test_options_for_a_gpu(run, asked, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ["--gpus=1", "--batch=4, 2", "--lanes=5", "--flavour=rtx", "--seconds=0.5", "--allow-host-code"]
    assert run("m=det.plan", *words) == 0
    ((request, env),) = asked
    assert request.engine == EngineSettings(device="gpu", lanes=5, flavour="rtx", host_code=True)
    assert (request.source.name, request.batches, request.strict, request.seconds) == ("m", (4, 2), True, 0.5)
    assert env["CUDA_VISIBLE_DEVICES"] == "1"


def test_an_onnx_file_is_built_for_the_gpu_first(run, asked, monkeypatch, capsys):
    built: list[BuildSettings] = []

    def ensure_plans(settings: PoolSettings, gpus: list[GpuInfo], say: Callable[[str], None]) -> PoolSettings:
        built.append(settings.build)
        assert [info.name for info in gpus] == ["H100"]
        say("model det: building a plan")
        return msgspec.structs.replace(settings, models=(ModelSource("/cache/det.plan", "det"),))

    monkeypatch.setattr(building, "ensure_plans", ensure_plans)
    assert run("det.onnx", "--gpus=0", "--fp16", "--io=uint8") == 0
    assert built == [BuildSettings(fp16=True, io={"": "uint8"})]
    assert asked[0][0].source.path == "/cache/det.plan"
    assert "model det: building a plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["det.onnx", "--batch=1,x"], 2, "is not a list of batch sizes, such as 1,8,32"),
        (["det.onnx", "--batch=0"], 2, "is not a list of batch sizes"),
        (["det.onnx", "--batch="], 2, "is not a list of batch sizes"),
        (["det.plan"], 3, "needs a GPU: name the GPUs to use, such as --gpus 0"),
        (["det.plan", "--gpus=0,1"], 3, "profile one GPU at a time, such as --gpus 0"),
        (["det.onnx", "--lanes=2"], 3, "--lanes is for GPUs"),
        (["det.onnx", "--io=fp16"], 3, "building a plan is for GPUs"),
        (["det.onnx", "--gpus=0", "--threads=2"], 3, "is for the CPU"),
        (["none.onnx"], 4, "there is no file"),
        (["det.onnx", "--html=nowhere/a.html"], 3, "there is no folder"),
    ],
)
def test_what_is_not_possible_is_one_line_and_starts_nothing(words, code, text, run, asked, capsys):
    assert run(*words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert asked == []


def test_what_the_child_refuses_is_an_exit_code(run, monkeypatch, capsys):
    def ask(*_: Any) -> Measured:
        raise ModelError("there are no batches in it; export it anew")

    monkeypatch.setattr(command, "ask", ask)
    assert run("det.onnx") == ModelError.exit_code
    assert capsys.readouterr().err == "trtpool: there are no batches in it; export it anew\n"


# --- What is printed -----------------------------------------------------------------------------


def test_on_a_terminal(run, asked, capsys):
    assert run("det.plan", "--gpus=0") == 0
    out, err = capsys.readouterr()
    assert "measuring" in err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "m: x float32 (N, 1000) -> y float32 (N, 1000), on H100"
    assert "batch phase min mean median p90 p95 p99" in lines
    assert "8 enqueue" + " 0.1000" * 6 in lines
    assert "end to end" + " 11.0" * 6 in lines
    assert "in series 2,000 5,818" in lines
    assert "4 in flight, no graph 1,600 -" in lines
    assert any(line.startswith("copies in 4.2 of 50.0 GB/s; copies out 4.2 of 25.0 GB/s") for line in lines)
    assert any(line.startswith("unstable clock: compute varies by 20.0%") for line in lines)
    assert "2.00x 3 batches in flight, against one after the other (in use)" in lines
    assert lines[-1] == judge(ON_GPU).summary
    assert all(len(line) <= 80 for line in out.splitlines() if "x float32" not in line and ": " not in line)


def test_on_the_cpu_there_is_nothing_of_copies(run, asked, capsys):
    assert run("det.onnx") == 0
    out = capsys.readouterr().out
    assert "one thread" in out
    assert not re.search("copy|copies|flight|pinned|graph", out)


def test_json_holds_figures_and_verdicts(run, asked, capsys):
    assert run("det.plan", "--gpus=0", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert msgspec.convert(report["measured"], Measured) == ON_GPU
    assert msgspec.convert(report["advice"], Advice) == judge(ON_GPU)
    assert report["version"]


# --- The page ------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects what a page refers to, and checks that each element is closed."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers += [name for name, _ in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(("measured", "plots"), [(ON_GPU, 3), (ON_CPU, 2)], ids=["gpu", "cpu"])
def test_a_page_needs_no_network(measured, plots):
    text = page(measured, judge(measured))
    reader = Reader(text)
    assert reader.refers == []
    assert reader.tags.count("svg") == plots
    assert not {"script", "link", "img", "iframe"}.intersection(reader.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert judge(measured).summary.split(" (")[0] in text


@pytest.mark.parametrize("measured", [ON_GPU, ON_CPU], ids=["gpu", "cpu"])
def test_plots_are_well_formed_and_within_their_frame(measured):
    for svg in re.findall(r"<svg.*?</svg>", page(measured, judge(measured)), re.DOTALL):
        root = ET.fromstring(svg)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for rect in root.iter("rect"):
            x, y, wide, tall = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + wide <= width
            assert 0 <= y < y + tall <= height
        for circle in root.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height


def test_bars_are_as_long_as_what_they_show():
    text = page(ON_GPU, judge(ON_GPU))
    found = {
        said: float(wide) for wide, said in re.findall(r'width="([0-9.]+)" height="18"[^>]*><title>(.*?)</title>', text)
    }
    one, other = found["8, in series, items/s: 2000 items/s"], found["64, in series, items/s: 5818 items/s"]
    assert other / one == pytest.approx(5818 / 2000, rel=0.01)
    assert found["batches of 8, copy in: 125 us"] * 2 == pytest.approx(found["batches of 8, compute: 250 us"], rel=0.01)


def test_names_are_text_and_not_markup():
    spec = model({"<script>x": "float32"}, {"y&z": "float32"})
    measured = gpu(batch(8, phases(0.1, 1, 2, 1)), spec=msgspec.structs.replace(spec, name="<b>"), bus=bus())
    reader = Reader(page(measured, judge(measured)))
    assert not {"script", "b"}.intersection(reader.tags)


def test_labels_of_plots_are_text_and_not_markup():
    svg = bars("<i>", [Bar("<b>", [Part("<u>", 1), Part("&", 2)], "a < b")], "<s>")
    assert set(Reader(svg).tags) == {"figure", "figcaption", "svg", "rect", "title", "text"}
    assert "a &lt; b" in svg


def test_the_page_is_written(run, asked, tmp_path, capsys):
    assert run("det.plan", "--gpus=0", "--html", "report.html") == 0
    assert (tmp_path / "report.html").read_text() == page(ON_GPU, judge(ON_GPU))
    (tmp_path / "folder").mkdir()
    assert run("det.plan", "--gpus=0", f"--html={'x' * 300}") == 3
    assert "name another file with --html" in capsys.readouterr().err


@pytest.mark.system
def test_the_command_as_users_run_it(run, tmp_path, capsys):
    from tests.models import MODELS, save

    path: Path = save(MODELS["mlp"].model, tmp_path)
    assert run(path, "--batch=1,4", "--seconds=0", "--json") == 0
    measured = msgspec.convert(json.loads(capsys.readouterr().out)["measured"], Measured)
    assert [figures.items for figures in measured.batches] == [1, 4]
    assert measured.batches[1].series.compute.count >= 10
    assert run("det.onnx") == ModelError.exit_code
    assert capsys.readouterr().err.splitlines()[-1].startswith("trtpool: ")


@pytest.mark.system
def test_an_interrupt_ends_the_child_too(tmp_path):
    from tests.models import MODELS, save

    words = [save(MODELS["mlp"].model, tmp_path), "--batch=20000", "--seconds=3600"]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while not process.stderr.readline().startswith("batches of 20000"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        finally:
            process.kill()
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "trtpool: the profile was stopped"
