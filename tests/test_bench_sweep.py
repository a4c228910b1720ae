"""`scripts/bench.py --sweep` and `--plot`: which points, the arithmetic, and one small sweep for real."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from rich.console import Console
from scripts.benchlib import sweep_cli, sweep_plot
from scripts.benchlib.cli import main
from scripts.benchlib.crew import Turn
from scripts.benchlib.gpu_cases import CASES
from scripts.benchlib.sweep import ARENA_BYTES, BASE, GROUPS, LARGE_BYTES, PLANS, Group, Point, groups
from scripts.benchlib.sweep_cli import Row, as_dict, base_of, grid
from scripts.benchlib.sweep_run import LEAD_S, Measured, Sweep, common, quantiles_us, rate

import trtpool
from trtpool.broker.pool import make_settings
from trtpool.ipc.settings import EngineSettings

ROOT = Path(__file__).resolve().parent.parent
ALL = [
    pytest.param(group, value, gpu, id=f"{group.name}-{value}-{'gpu' if gpu else 'cpu'}")
    for gpu in (False, True)
    for group in groups(None, gpu=gpu, quick=False)
    for value in group.values
]


# --- Points ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_the_base_is_in_each_group(gpu: bool, quick: bool):
    for group in groups(None, gpu=gpu, quick=quick):
        assert group.base in group.values
        assert group.point(group.base, gpu=gpu) == BASE
        assert list(group.values) == sorted(set(group.values))
        assert set(group.values) <= set(GROUPS[group.name][0])


def test_lanes_are_varied_on_a_gpu_only():
    assert [group.name for group in groups(None, gpu=True, quick=False)] == list(GROUPS)
    assert "lanes" not in [group.name for group in groups(None, gpu=False, quick=False)]
    with pytest.raises(ValueError, match=r"no parameter lanes, no to vary; there are producers, "):
        groups("lanes,run,no", gpu=False, quick=True)


@pytest.mark.parametrize(("group", "value", "gpu"), ALL)
def test_one_parameter_differs_and_producers_have_the_slots_that_they_need(group: Group, value: int, gpu: bool):
    point = group.point(value, gpu=gpu)
    assert getattr(point, group.name) == value
    different = {name for name, one in asdict(point).items() if one != getattr(BASE, name)} - {group.name}
    assert different <= ({"slots", "run", "max_batch"} if value > 2**20 or point.items_per_slot > 1 else set())
    assert point.cap >= (point.window + 1) * point.run or point.window == 1
    assert point.producers * point.window * point.run <= point.slots
    assert point.max_batch >= point.items_per_slot
    if point.slots > 16:
        assert point.slots * point.items_per_slot * point.item_bytes <= ARENA_BYTES


def test_large_items_get_fewer_slots_shorter_runs_and_smaller_batches():
    point = Point(item_bytes=LARGE_BYTES).fit()
    assert (point.slots, point.run, point.max_batch) == (21, 1, 5)
    assert replace(point, item_bytes=4 << 20, slots=4096).fit().slots == 256


def test_plans_are_those_of_the_gpu_cases():
    for name, largest in PLANS.values():
        assert largest == max(case.max_batch for case in CASES.values() if case.plan == name)


def test_points_that_differ_in_their_producers_share_a_pool():
    assert BASE.pool == replace(BASE, producers=64, run=1).pool
    assert BASE.pool != replace(BASE, slots=64).pool


class Started(trtpool.Pool):
    """Stands for a pool; `asked` is what was asked for, of each."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        self.asked.append(options)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __del__(self) -> None: ...


@pytest.mark.parametrize("gpu", [None, "0"], ids=["CPU", "GPU"])
def test_pools_are_asked_for_as_they_can_be(gpu: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All options go through the checks of a real start; the base's pool is there for all groups."""
    monkeypatch.setattr(trtpool, "Pool", Started)
    monkeypatch.setattr(Started, "asked", [])
    plans = None if gpu is None else (lambda item_bytes: tmp_path / f"{PLANS[item_bytes][0]}.plan")
    sweep = Sweep(tmp_path, gpu, plans)
    points = [group.point(value, gpu=gpu is not None) for group in groups("producers,workers,run", gpu=gpu is not None,
              quick=True) for value in group.values]  # fmt: skip
    for point in points:
        sweep._started(point)
    sweep.close()
    assert len(Started.asked) == 2
    for options in Started.asked:
        given = dict(options)
        engine = EngineSettings(threads=given.pop("threads", 0), lanes=given.pop("lanes", EngineSettings().lanes))
        model, gpus = given.pop("model"), tuple(given.pop("gpus", ()))
        made = make_settings([model], run_dir=tmp_path, gpus=gpus, engine=engine, **given)
        assert (made.slots, made.max_batch, made.max_slots_per_producer) == (4096, 256, 1024)
    numbers = [one.get("workers", one.get("workers_per_gpu")) for one in Started.asked]
    assert numbers == [1, 2]


# --- Arithmetic -----------------------------------------------------------------------------------

REPORT = array("q", [1_000, 500, 4, 2_000, 600, 4, 3_000, 700, 4, 9_000, 9_999, 4])
"""Four submissions of 4 items: when they ended, and after how long."""


def test_a_rate_lies_between_the_first_end_and_the_last_in_a_window():
    assert rate([REPORT], 1_000, 3_000) == pytest.approx(8 / 2_000e-9)
    assert rate([REPORT, array("q", [2_500, 1, 16])], 1_500, 3_500) == pytest.approx(20 / 1_000e-9)
    with pytest.raises(ValueError, match="1 runs ended within the window; make it longer with --window-s"):
        rate([REPORT], 2_500, 3_500)


def test_a_window_is_what_all_producers_have_in_common():
    turns = [Turn(10.0, 12.0, None), Turn(10.25, 12.0, None)]
    assert common(turns, 1.0) == (int(1e9 * (10.25 + LEAD_S)), int(11e9))


def test_latencies_are_those_in_the_window():
    assert quantiles_us([REPORT], 1_000, 3_000) == (0.6, 0.7)
    assert quantiles_us([REPORT]) == (0.7, 9.999)
    with pytest.raises(ValueError, match="nothing ended"):
        quantiles_us([REPORT], 4_000, 5_000)


def measured(items_per_s: float) -> Measured:
    who = {"producers": 3.0, "broker": 2.0, "worker": 1.0}
    return Measured(items_per_s, 100.0, 900.0, 50.0, 60.0, 31.5, 1.25, who, [items_per_s])


def rows(
    name: str = "slots", values: tuple[int, ...] = (64, 4096, 65_536), gpu: bool = True
) -> tuple[Group, list[Row]]:
    """The first was not measured; the others did 1,000 and 1,500 items/s."""
    group = Group(name, values)
    found = [Row(value, group.point(value, gpu=gpu)) for value in values]
    found[0].why = "RuntimeError: line one\nthe last line"
    found[1].measured, found[2].measured = measured(1000.0), measured(1500.0)
    return group, found


def test_figures_are_relative_to_the_base_of_their_group():
    group, found = rows()
    assert base_of(group, found) is found[1].measured
    kept = json.loads(json.dumps(as_dict(group, found)))
    assert [one["relative"] for one in kept["points"]] == [None, 1.0, 1.5]
    assert kept["points"][2]["measured"]["rounds"] == [1500.0]
    assert kept["points"][0]["why"].startswith("RuntimeError")
    found[1].measured = None
    assert found[2].relative(base_of(group, found)) is None


def test_a_group_is_shown_with_what_failed():
    out = io.StringIO()
    Console(file=out, width=sweep_cli.WIDTH).print(grid(*rows()))
    text = out.getvalue()
    assert "the last line" in text
    assert "4,096 (base)" in text
    assert "1.5" in text
    assert "…" not in text


def test_what_else_differs_is_said():
    group = Group("item_bytes", (1024, LARGE_BYTES))
    assert sweep_cli.besides(group, group.point(LARGE_BYTES, gpu=False)) == "21 slots, 1 a run, 5 a batch"
    assert sweep_cli.besides(group, group.point(1024, gpu=False)) == ""


# --- Figures --------------------------------------------------------------------------------------


def content(gpu: str | None = "0") -> dict[str, object]:
    machine = {"cpu": "a CPU", "cores": 2, "date": "2026-11-22T10:00+00:00"}
    if gpu is not None:
        machine["gpus"] = ["a GPU, PCIe 5 x16"]
    return {
        "sweep": 1, "gpu": gpu, "machine": machine,
        "groups": [as_dict(*rows()), as_dict(*rows("producers", (1, 4, 16))), as_dict(*rows("run", (1, 16, 64))),
                   as_dict(*rows("items_per_slot", (1, 4, 16)))],
    }  # fmt: skip


def test_a_curve_leaves_out_what_was_not_measured():
    group = as_dict(*rows())
    assert sweep_plot.series(group, "items_per_s", relative=False) == ([4096, 65_536], [1000.0, 1500.0])
    assert sweep_plot.series(group, "items_per_s", relative=True) == ([4096, 65_536], [1.0, 1.5])
    without_base = {**group, "points": [group["points"][2]]}
    assert sweep_plot.series(without_base, "items_per_s", relative=True) == ([], [])


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), (4096, "4096"), (16_384, "16Ki"), (65_536, "64Ki"), (LARGE_BYTES, "46.9Mi")]
)
def test_parameters_are_short_on_an_axis(value: int, text: str):
    assert sweep_plot.tick(value) == text


@pytest.mark.parametrize("gpu", ["0", None], ids=["absolute", "relative"])
def test_figures_are_drawn(gpu: str | None, tmp_path: Path):
    pytest.importorskip("matplotlib")
    source = tmp_path / "found.json"
    source.write_text(json.dumps(content(gpu)))
    result = CliRunner().invoke(main, ["--plot", str(source)], catch_exceptions=False)
    files = [tmp_path / "found-throughput.png", tmp_path / "found-latency.png"]
    assert result.output.split() == [str(path) for path in files]
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = tmp_path / "found.json"
    source.write_text(json.dumps(content()))
    result = CliRunner().invoke(main, ["--plot", str(source)])
    assert result.exit_code == 1
    assert "pip install 'trtpool[plots]'" in result.output


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    for text, says in (("{}", "is of no sweep"), ("nonsense", "is not JSON")):
        source = tmp_path / "other.json"
        source.write_text(text)
        result = CliRunner().invoke(main, ["--plot", str(source)])
        assert result.exit_code == 1
        assert says in " ".join(result.output.split())


# --- Command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sweep", "--gpu", "0"], "--gpu needs --engines"),
        (["--sweep", "--engines", "."], "--engines is for --gpu"),
        (["--sweep", "--gpu", "0,1", "--engines", "."], "a sweep takes one GPU"),
        (["--sweep", "--no-pool"], "leaves nothing"),
        (["--sweep", "--only", "nonsense"], "there are producers, run,"),
        (["--plot-dir", "."], "--plot-dir is for --plot"),
        (["--window-s", "1"], "--window-s is for --gpu or --sweep"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], says: str):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.system
def test_a_small_sweep(tmp_path: Path):
    """Through the script: its producers must find its modules."""
    kept = tmp_path / "kept.json"
    script = [sys.executable, str(ROOT / "scripts" / "bench.py")]
    arguments = ["--sweep", "--quick", "--only", "workers", "--window-s", "0.3", "--json", str(kept)]
    result = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    (group,) = json.loads(kept.read_text())["groups"]
    assert [one["value"] for one in group["points"]] == [1, 2]
    for one in group["points"]:
        found = one["measured"]
        assert found["items_per_s"] > 0
        assert found["p99_us"] >= found["p50_us"] > 0
        assert found["alone_p50_us"] > 0
        assert 1 <= found["items_per_batch"] <= 256
        assert set(found["cpu_us_per_item"]) >= {"producers", "broker", "worker"}
