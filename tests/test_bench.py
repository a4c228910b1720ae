"""The arithmetic of `scripts/bench.py --gpu`: without a GPU, and without starting a process."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import pytest
from rich.console import Console
from scripts import make_models
from scripts.benchlib import gpu_cli, gpu_report
from scripts.benchlib.gpu_cases import CASES, together
from scripts.benchlib.gpu_items import Expected, Load, Pace, Source, Tensor, prepare, sample
from scripts.benchlib.gpu_results import ALONE, BESIDE, BUS, CEILING, POOL, TODAY, Aim, Result, Row, limits
from scripts.benchlib.gpu_watch import Gpu
from scripts.benchlib.gpu_window import Window, classify, edge, spent

from trtpool.broker.cli_build import build

IMAGE = Tensor("x", "float32", (3, 4, 4))


def window(items_per_s: float, took_s: float = 2.0, **more: float) -> Window:
    """A window from 10 s on, in batches of 4."""
    items = items_per_s * took_s
    cpu_s = {"producers": 0.5 * took_s, "worker": 0.1 * took_s, "broker": 0.2 * took_s}
    return Window(items, items / 4, 10.0, 10.0 + took_s, items / 4, items / 4, cpu_s, dict(more))


def row(name: str, *rates: float | None, item_bytes: int = 100, **more: float) -> Row:
    windows = [None if rate is None else window(rate, **more) for rate in rates]
    return Row(name, item_bytes, 10, list(windows), [None] * len(rates))


def result(*rows: Row, aims: tuple[Aim, ...] = ()) -> Result:
    return Result("case", "a title", 4, aims, {one.name: one for one in rows}, {CEILING: {"engine_ms": 2.0}})


# --- Ratios and aims ------------------------------------------------------------------------------


def test_ratios_are_paired_by_round_and_skip_rounds_that_lack_one():
    aim = Aim(POOL, (BESIDE,), 0.97)
    ratio = result(row(POOL, 98, None, 99, 40), row(BESIDE, 100, 100, None, 80), aims=(aim,)).ratio(aim)
    assert ratio.values == [0.98, 0.5]
    assert ratio.median == pytest.approx(0.74)
    assert ratio.met is False


def test_a_ratio_to_several_is_to_their_sum():
    aim = Aim("both", ("one", "two"), 0.95)
    ratio = result(row("both", 190), row("one", 100), row("two", 90)).ratio(aim)
    assert ratio.values == [1.0]
    assert ratio.met
    assert str(aim) == "both / (one + two)"


def test_the_bus_is_compared_by_bytes():
    aim = Aim(POOL, (BUS,), 0.97)
    pool, bus = row(POOL, 98, item_bytes=100), row(BUS, 10_000, item_bytes=1)
    assert result(pool, bus).ratio(aim).values == [0.98]


@pytest.mark.parametrize("rows", [[row(POOL, 1)], [row(POOL, 1), row(BESIDE, None)], [row(POOL), row(BESIDE)]])
def test_an_aim_without_both_sides_is_not_met(rows):
    ratio = result(*rows).ratio(Aim(POOL, (BESIDE,), 0.97))
    assert (ratio.values, ratio.median, ratio.met) == ([], None, False)


def test_what_is_only_reported_is_neither_met_nor_missed():
    assert result(row(POOL, 1), row(TODAY, 2)).ratio(Aim(POOL, (TODAY,))).met is None


def test_costs_are_over_all_windows_of_a_row():
    pool = row(POOL, 100, 300, None)
    assert pool.items_per_s == 200
    assert pool.cpu_share("broker") == pytest.approx(0.2)
    assert pool.cpu_s_per_1000("broker") == pytest.approx(1.0)
    assert pool.cpu_share("supervisor") is None


def test_limits_name_what_is_used_most_first():
    pool = row(POOL, 400, waiting=0.6, leasing=0.1)
    found = limits(result(pool, row(ALONE, 500), row(BUS, 80_000, item_bytes=1, out_per_s=8000.0)))
    assert [(limit.name, round(limit.used, 9)) for limit in found] == [
        ("the producers' own writes", 0.8),
        ("the bus, inwards", 0.5),
        ("the bus, outwards", 0.5),
        ("the producers' time", 0.3),
        ("the broker's thread", 0.2),
        ("the engine on the GPU", 0.2),
        ("the interpreter of the worker", 0.1),
    ]


def test_several_at_once_add_up_to_one_window():
    one, two = window(100, launch_us=2.0), Window(30, 3, 10.5, 13.0, 6, 3, {"worker": 1.0}, {"launch_us": 4.0})
    both = together([one, two])
    assert (both.began_s, both.ended_s) == (10.0, 13.0)
    assert both.items_per_s == pytest.approx(112)
    assert both.cpu_s["worker"] == pytest.approx(1.2)
    assert both.figures == {"launch_us": 3.0}
    assert together([one]) is one
    assert together([one, None]) is together([None]) is None


# --- Marks and pace -------------------------------------------------------------------------------


class FakeClock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def test_a_mark_is_set_when_the_count_changes():
    clock = FakeClock()
    counts = iter([5, 5, 5, 69, 69])
    at = edge(lambda: next(counts), clock, clock.sleep)
    assert at.value == 69
    assert at.at_s == pytest.approx(3 * 0.0003)


def test_a_mark_is_set_in_the_end_if_the_count_stands_still():
    clock = FakeClock()
    at = edge(lambda: 5, clock, clock.sleep, limit_s=0.01)
    assert at.value == 5
    assert at.at_s == pytest.approx(0.01, abs=0.0004)


def test_a_pace_is_kept_whatever_the_work_takes():
    pace, now_s, starts = Pace(0.1, 0.0), 0.0, []
    for work_s in (0.01, 0.15, 0.01, 0.01):
        now_s += pace.wait_s(now_s)
        starts.append(now_s)
        now_s += work_s
    assert starts == pytest.approx([0.0, 0.1, 0.25, 0.3])


def test_a_pace_that_cannot_be_kept_is_not_caught_up_with_for_ever():
    pace = Pace(0.1, 0.0)
    pace.wait_s(0.0)
    waits = [pace.wait_s(10.0) for _ in range(8)]
    assert waits == pytest.approx([0, 0, 0, 0, 0, 0, 0.1, 0.2])


def test_a_pace_of_nothing_never_waits():
    pace = Pace(0.0, 0.0)
    assert [pace.wait_s(now_s) for now_s in (0.0, 0.0, 5.0)] == [0, 0, 0]


def test_cpu_of_processes_that_ended_counts_nothing():
    assert spent({"worker": 3.0, "broker": 1.0}, {"worker": 0.0, "broker": 1.5, "producers": 0.25}) == {
        "worker": 0.0, "broker": 0.5, "producers": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cmdline", "who"),
    [
        (["python", "-m", "trtpool.broker.supervise"], "supervisor"),
        (["python", "-m", "trtpool.broker"], "broker"),
        (["python", "-m", "trtpool.workers"], "worker"),
        (["python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main(pipe_handle=9)"], "producers"),
        (["python", "-c", "from multiprocessing.resource_tracker import main;main(5)"], ""),
        ([], ""),
    ],
)
def test_processes_are_told_by_their_command_line(cmdline, who):
    assert classify(cmdline) == who


def test_a_gpu_is_as_busy_as_the_samples_within_a_window_say():
    gpu = Gpu("a GPU", "PCIe 5 x16", [(1.0, 0.0), (2.0, 90.0), (3.0, 100.0), (4.0, 10.0)])
    assert gpu.busy(1.5, 3.0) == pytest.approx(0.95)
    assert gpu.busy(5.0, 6.0) is None


# --- Items ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int8", "int32", "bool"])
def test_prepared_slots_differ_from_each_other(dtype):
    slots = prepare(Tensor("x", dtype, (5, 8)), 3, 4, seed=1)
    assert (slots.shape, str(slots.dtype)) == ((4, 3, 5, 8), dtype)
    assert len({slot.tobytes() for slot in slots}) == 4


def test_a_source_goes_round_and_never_gives_a_slot_what_it_had():
    source = Source(Load((IMAGE,), 1, run=2, period=3))
    assert [source.take(2).start for _ in range(4)] == [0, 2, 1, 0]
    target = np.zeros((2, 3, 4, 4), np.float32)
    source.write({"x": target}, slice(3, 5))
    assert np.array_equal(target[1], source.row(4)["x"])


def mean_of(source: Source, rows: slice) -> npt.NDArray[np.float32]:
    return np.stack([source.row(row)["x"].mean(keepdims=True)[0, 0] for row in range(rows.start, rows.stop)])


def test_a_result_of_another_item_is_found_out():
    source = Source(Load((IMAGE,), 1, run=2, period=5))
    expected = Expected([sample(mean_of(source, slice(row, row + 1)), 1) for row in range(source.rows)])
    assert expected.told_apart == 1
    right = mean_of(source, slice(2, 4))
    expected.check(right, slice(2, 4))
    for wrong in (right[::-1], np.full_like(right, np.nan), np.zeros_like(right)):
        with pytest.raises(ValueError, match="wrong result for prepared slots 2 to 4"):
            expected.check(wrong, slice(2, 4))


def test_items_that_a_model_does_not_tell_apart_are_counted():
    assert Expected([np.array([[1.0]]), np.array([[1.001]]), np.array([[2.0]])]).told_apart == pytest.approx(2 / 3)


def test_a_model_that_gives_no_numbers_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        Expected([np.array([[np.inf]])])


# --- Report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (0.01234, "0.012"), (1.5, "1.500"), (2.345, "2.35"), (54.87, "54.9"), (999.6, "1,000"),
     (99_999, "99,999"), (123_456, "123.5k"), (4_123_456, "4.12M")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str):
    assert gpu_report.short(value) == text


def shown(one: Result) -> str:
    out = io.StringIO()
    gpu_report.show(Console(file=out, width=gpu_report.WIDTH), one)
    return out.getvalue()


def full_result() -> Result:
    """A case whose aim was missed, with one contender that failed."""
    pool = row(POOL, 90_000, 91_000, waiting=0.1, leasing=0.1, writing=0.8)
    today = row(TODAY, 1_234, None)
    today.failure = "Traceback (most recent call last):\n  File x\nRuntimeError: no answer"
    aims = (Aim(POOL, (BESIDE,), 0.97), Aim(POOL, (TODAY,)), Aim(POOL, (CEILING,), 0.5))
    rows = row(CEILING, 100_000, 100_000), row(BESIDE, 100_000, 100_000), pool, today, row(ALONE, 92_000, 92_000)
    return result(*rows, aims=aims)


def test_a_case_is_shown_with_aims_and_with_what_stands_in_the_way():
    text = shown(full_result())
    assert all(len(line) <= gpu_report.WIDTH for line in text.splitlines())
    assert "…" not in text
    assert "90,000 - 91,000" in text
    assert "today FAILED: RuntimeError: no answer" in text
    assert "pool / ceiling + writers = 0.905 (0.900 - 0.910), at least 0.97: MISSED" in text
    assert "pool / ceiling = 0.905 (0.900 - 0.910), at least 0.5: met" in text
    assert "the producers' own writes 98 %" in text


def test_limits_are_left_out_where_all_aims_were_met():
    assert "could limit" not in shown(result(row(POOL, 99), row(BESIDE, 100), aims=(Aim(POOL, (BESIDE,), 0.97),)))


def test_a_case_in_which_all_failed_is_shown_too():
    rows = [Row(name, failure="it ended with -9", windows=[None]) for name in (CEILING, BESIDE, POOL)]
    text = shown(result(*rows, aims=(Aim(POOL, (BESIDE,), 0.97),)))
    assert "pool FAILED: it ended with -9" in text
    assert "at least 0.97: NOT MEASURED" in text


def test_all_is_in_the_json():
    kept = json.loads(json.dumps(gpu_report.as_dict(full_result())))
    assert kept["aims"][0]["met"] is False
    assert kept["limits"]["the producers' own writes"] == pytest.approx(90_500 / 92_000)
    (pool,) = (one for one in kept["rows"] if one["name"] == POOL)
    assert [one["items"] for one in pool["windows"]] == [180_000, 182_000]
    assert pool["cpus"]["broker"] == pytest.approx(0.2)


# --- Command line ---------------------------------------------------------------------------------


def names(only: str | None, *gpus: str, quick: bool = False) -> list[str]:
    return [case.name for case in gpu_cli.choose(only, gpus, quick=quick)]


def test_cases_of_two_gpus_need_two():
    assert names(None, "0", "1") == list(CASES)
    assert [name for name in CASES if name not in names(None, "0")] == [
        "resnet50_pair", "resnet50_io16_pair", "reduce_pair",
    ]  # fmt: skip
    with pytest.raises(click.BadParameter, match="--gpu 0,1"):
        names("mlp,reduce_pair", "0")


def test_quick_leaves_out_second_batch_sizes_unless_they_are_asked_for():
    assert set(names(None, "0")) - set(names(None, "0", quick=True)) == {"reduce4", "mlp1"}
    assert names("mlp1,mlp", "0", quick=True) == ["mlp1", "mlp"]


def test_an_unknown_case_is_answered_with_those_there_are():
    with pytest.raises(click.BadParameter, match=r"no case nonsense with --gpu; there are resnet50, "):
        names("mlp,nonsense", "0")


def test_plans_are_found_as_they_are_or_packed(tmp_path: Path):
    engines, made = tmp_path / "engines", tmp_path / "made"
    engines.mkdir()
    made.mkdir()
    (engines / "a.plan").write_bytes(b"plan a")
    (engines / "b.plan.xz").write_bytes(lzma.compress(b"plan b"))
    assert gpu_cli.find_plan("a", engines, made) == engines / "a.plan"
    assert gpu_cli.find_plan("b", engines, made).read_bytes() == b"plan b"
    assert gpu_cli.find_plan("c", engines, made) is None


@pytest.mark.parametrize("name", sorted({case.plan for case in CASES.values()}))
def test_each_plan_can_be_built_in_batches_as_large_as_its_cases(name: str, tmp_path: Path):
    command, onnx_path = gpu_cli.build_command(name, tmp_path, tmp_path, "0")
    parsed = build.make_context("build", command[command.index("build") + 1 :]).params
    assert (parsed["model"], parsed["output"], parsed["gpu"]) == (onnx_path, tmp_path / f"{name}.plan", "0")
    (profile,) = parsed["profiles"][0].values()
    assert profile.min[0] == 1
    assert profile.max[0] >= max(case.max_batch for case in CASES.values() if case.plan == name)
    assert onnx_path.stem in gpu_cli.MADE or name == "ppocr_det"


def test_what_make_models_writes_is_what_the_benchmark_asks_for():
    assert set(gpu_cli.MADE) == set(make_models.MODELS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_leaves_producers_the_slots_that_they_need(case):
    """With their runs in flight, and one more each in advance, a quarter of the slots stays free."""
    held = case.producers * (case.window + 1) * case.run
    assert held <= 0.75 * case.slots
    in_worker = (3 + 1) * case.max_batch / case.items_per_slot
    assert case.producers * case.window * case.run >= in_worker + case.producers * case.run


def test_weights_are_those_that_the_prebuilt_plans_have(tmp_path: Path):
    (path,) = make_models.write(tmp_path, ["mlp"])
    weights = [onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest()
    assert [array.shape for array in weights] == [(256, 256), (256, 16)]
    assert digest == "d9bce48aa15d73d1e00439aa030a320d3a467b5cc517854ab0c3af19689a7276"
