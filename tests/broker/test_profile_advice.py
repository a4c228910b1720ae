"""Verdicts of a profile as a function of made-up figures."""

from __future__ import annotations

import msgspec
import pytest

from tests.broker.profile_figures import FLOATS, MIB, batch, bus, constant, cpu, gpu, model, noisy, overlaps, phases
from trtpool.broker.profiling.advice import Advice, Remedy, Verdict, judge, period_ns
from trtpool.ipc.profiling import Measured, Overlap


def only(measured: Measured) -> Verdict:
    (verdict,) = judge(measured).verdicts
    return verdict


def gains(verdict: Verdict, *, in_use: bool = False) -> dict[str, float]:
    return {one.what: round(one.gain, 3) for one in verdict.remedies if one.in_use == in_use}


# --- What sets the pace --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enqueue", "copy_in", "compute", "copy_out", "kind", "why"),
    [
        (0.1, 0.5, 1.0, 0.5, "compute-bound", "compute takes 1.000 ms"),
        (0.1, 1.1, 1.0, 0.5, "transfer-bound", "copies in take 1.100 ms"),
        (0.1, 0.5, 1.0, 1.2, "transfer-bound", "copies out take 1.200 ms"),
        (0.1, 1.0, 1.0, 1.0, "compute-bound", "compute"),
        (0.79, 0.5, 1.0, 0.5, "compute-bound", "compute"),
        (0.81, 0.5, 1.0, 0.5, "enqueue-bound", "the CPU takes 0.810 ms"),
        (0.9, 1.5, 1.0, 0.5, "transfer-bound", "copies in"),  # both are, and this is the slower
        (2.0, 1.5, 1.0, 0.5, "enqueue-bound", "the CPU"),
    ],
)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_what_sets_the_pace(enqueue, copy_in, compute, copy_out, kind, why, on_gpu):
    figures = batch(8, phases(enqueue, copy_in, compute, copy_out))
    verdict = only(gpu(figures) if on_gpu else cpu(figures))
    assert verdict.kind == kind
    assert verdict.text.startswith(f"{kind}: ")
    assert why in verdict.text


@pytest.mark.parametrize(
    ("lanes", "period_ms"),
    [(1, 4.0), (2, 3.0), (3, 2.0), (4, 2.5), (9, 2.5)],
)
def test_items_per_second_are_those_of_the_lanes_that_a_pool_has(lanes, period_ms):
    figures = batch(8, phases(0.1, 1, 2, 1), overlaps=overlaps(4, 3, 2, 2.5))
    measured = gpu(figures, lanes=lanes)
    assert period_ns(measured, figures) == period_ms * 1e6
    assert only(measured).items_per_s == pytest.approx(8000 / period_ms)


def test_on_the_cpu_they_are_those_in_series():
    assert only(cpu(batch(8, phases(0.1, 0, 2, 0, 2.1)))).items_per_s == pytest.approx(8000 / 2.1)


def test_achieved_rates_stand_beside_those_of_the_bus():
    advice = judge(gpu(batch(8, phases(0.1, 0.1, 2, 0.2), 4_000_000, 2_000_000)))
    rates = [advice.verdicts[0].in_gbs, advice.verdicts[0].out_gbs, advice.bus_in_gbs, advice.bus_out_gbs]
    assert rates == pytest.approx([40, 10, 50, 25])


# --- Warnings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deviation", "warned"), [(0.009, False), (0.011, True)])
def test_an_unstable_clock(deviation, warned):
    verdict = only(gpu(batch(8, phases(0.1, 0.1, 1, 0.1, deviation=deviation), graph=True)))
    assert any("unstable clock" in warning for warning in verdict.warnings) == warned


@pytest.mark.parametrize(("slow", "warned"), [(1_090_000, False), (1_110_000, True)])
def test_an_unstable_cpu_is_told_by_its_slow_tenth(slow, warned):
    series = msgspec.structs.replace(phases(0.1, 0, 1, 0), compute=noisy(1_000_000, slow))
    assert any("unstable" in warning for warning in only(cpu(batch(8, series))).warnings) == warned


def test_an_engine_without_a_graph_and_a_plan_without_lanes():
    fine = batch(8, phases(0.1, 0.1, 1, 0.1), graph=True, overlaps=overlaps(1, 1, 1, 1))
    assert only(gpu(fine)).warnings == ()
    lacking = msgspec.structs.replace(fine, graph=False, overlaps=overlaps(1))
    graph, lanes = only(gpu(lacking)).warnings
    assert "cannot be captured" in graph
    assert "allows 1 lanes of 3" in lanes


@pytest.mark.parametrize(
    ("limit", "ms", "warned"), [(0, 1.9, True), (16, 1.9, False), (64, 1.9, True), (0, 1.95, False)]
)
def test_sizes_that_were_not_measured_may_be_faster_still(limit, ms, warned):
    spec = msgspec.structs.replace(FLOATS, batch_limit=limit)
    small, large = judge(cpu(batch(8, phases(0, 0, 1, 0)), batch(16, phases(0, 0, ms, 0)), spec=spec)).verdicts
    assert small.warnings == ()
    assert any("still rise" in warning for warning in large.warnings) == warned


@pytest.mark.parametrize(("in_place_ms", "said"), [(1.9, True), (2.0, False), (4.0, False)])
def test_inputs_in_place_are_a_hint_where_they_are_faster(in_place_ms, said):
    figures = batch(
        8, phases(0.1, 1, 1, 1), graph=True, copied=phases(0.1, 1, 1, 0), in_place=phases(0.1, 0, in_place_ms, 0)
    )
    hints = [warning for warning in only(gpu(figures)).warnings if "hint" in warning]
    assert len(hints) == said
    assert all("takes 1.900 ms, against 2.000 ms with a copy" in hint for hint in hints)


# --- Remedies ------------------------------------------------------------------------------------


def test_fewer_bytes_gain_what_they_take_off_the_bound():
    # 4 ms in: half is 2, a quarter is 1, where compute of 1.6 is the next bound.
    verdict = only(gpu(batch(8, phases(0.1, 4, 1.6, 0.1), 64 * MIB, 64 * MIB)))
    assert gains(verdict) == {"fp16-io": 2.0, "uint8-io": 2.5, "gpu": 2.0}
    assert [remedy.what for remedy in verdict.remedies] == ["uint8-io", "fp16-io", "gpu"]
    assert all(not remedy.measured for remedy in verdict.remedies)


def test_copies_that_cost_their_call_gain_little():
    # 4 KiB take 10 us of which all but 0.1 us are fixed.
    verdict = only(gpu(batch(8, phases(0.001, 0.01, 0.001, 0.001), 4096, 4096), bus=bus(fixed_ms=0.01)))
    assert gains(verdict) == {"gpu": 2.0}


def test_outputs_get_smaller_by_fp16_alone():
    verdict = only(gpu(batch(8, phases(0.1, 0.1, 1, 4))))
    assert gains(verdict) == {"fp16-io": 2.0, "gpu": 2.0}
    assert "inputs and outputs, --io fp16" in verdict.remedies[0].text


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"x": "uint8"}, set()),
        ({"x": "int32"}, set()),
        ({"x": "float16"}, {"uint8-io"}),
        ({"x": "float32"}, {"fp16-io", "uint8-io"}),
        ({"x": "float32", "k": "uint8"}, {"fp16-io", "uint8-io"}),
    ],
)
def test_only_wide_floats_can_be_smaller(inputs, expected):
    spec = model(inputs, {"y": "int32"})
    found = gains(only(gpu(batch(8, phases(0.1, 4, 0.1, 0.1)), spec=spec)))
    assert set(found) - {"gpu"} == expected


def test_mixed_inputs_shrink_by_their_share():
    spec = model({"x": "float32", "k": "uint8"}, {"y": "int32"})  # 4000 + 1000 bytes an item
    found = gains(only(gpu(batch(8, phases(0.1, 5, 0.1, 0.1)), spec=spec, bus=bus(sizes=(4096,)))))
    assert found == {"fp16-io": 1.667, "uint8-io": 2.5, "gpu": 2.0}


def test_larger_batches_gain_what_was_measured():
    small = batch(1, phases(0.1, 0.1, 1, 0.1), overlaps=overlaps(2, 1, 1))
    large = batch(8, phases(0.1, 0.1, 2, 0.1), overlaps=overlaps(3, 2, 2))
    first, second = judge(gpu(small, large)).verdicts
    assert gains(first) == {"batch": 4.0, "gpu": 2.0}
    assert first.remedies[0] == Remedy("batch", "larger batches: --max-batch 8", 4.0, measured=True)
    assert gains(second) == {"gpu": 2.0}


def test_smaller_batches_where_those_are_faster():
    first, second = judge(cpu(batch(1, phases(0, 0, 1, 0)), batch(8, phases(0, 0, 16, 0)))).verdicts
    assert gains(first) == {}
    assert gains(second) == {"batch": 2.0}
    assert second.remedies[0].text == "smaller batches: --max-batch 1"


@pytest.mark.parametrize(
    ("periods", "lanes", "expected"),
    [
        ((4, 3, 2, 1), 3, ("more lanes: --lanes 4", 2.0)),
        ((4, 1, 2, 3), 3, ("fewer lanes: --lanes 2", 2.0)),
        ((4, 3, 2, 1.95), 3, None),
    ],
)
def test_lanes_gain_what_was_measured(periods, lanes, expected):
    verdict = only(gpu(batch(8, phases(0.1, 1, 1, 1), overlaps=overlaps(*periods)), lanes=lanes))
    found = [(one.text, pytest.approx(one.gain)) for one in verdict.remedies if one.what == "lanes"]
    assert found == ([expected] if expected else [])


def test_what_is_in_use_says_what_it_gains():
    figures = batch(
        8, phases(0.1, 1, 2, 1), graph=True, overlaps=overlaps(4, 3, 2, 2), plain=phases(1, 1, 2, 1),
        plain_overlap=Overlap(4, 100, 500_000_000), pageable=phases(5, 4, 2, 4),
    )  # fmt: skip
    verdict = only(gpu(figures))
    assert gains(verdict, in_use=True) == {"overlap": 2.0, "graphs": 2.5, "pinned": 2.5}
    assert "graphs" not in gains(verdict)
    assert [remedy.in_use for remedy in verdict.remedies] == sorted(remedy.in_use for remedy in verdict.remedies)


def test_graphs_that_cost_more_than_they_save_are_to_be_left_out():
    figures = batch(
        8, phases(0.1, 0, 2, 0), graph=True, overlaps=overlaps(4, 4, 4, 4), plain=phases(0.1, 0, 2, 0),
        plain_overlap=Overlap(4, 100, 200_000_000),
    )  # fmt: skip
    (remedy,) = [one for one in only(gpu(figures)).remedies if one.what == "graphs"]
    assert (remedy.gain, remedy.in_use, remedy.text) == (2.0, False, "no CUDA graphs: --no-graphs")


def test_another_worker_where_the_cpu_is_the_bound():
    verdict = only(gpu(batch(8, phases(4, 0.5, 1, 0.5))))
    assert gains(verdict) == {"workers": 2.0, "gpu": 2.0}
    assert "--workers-per-gpu 2" in verdict.remedies[0].text
    verdict = only(gpu(batch(8, phases(4, 0.5, 3, 0.5))))
    assert gains(verdict)["workers"] == 1.333


@pytest.mark.parametrize(("alone_ms", "gain"), [(1, 8.0), (4, 2.0), (7.9, None), (8, None)])
def test_workers_of_one_thread_on_the_cpu(alone_ms, gain):
    verdict = only(cpu(batch(8, phases(0, 0, 2, 0), one_thread=phases(0, 0, alone_ms, 0)), threads=4))
    assert gains(verdict) == ({"workers": gain} if gain else {})


# --- The summary ---------------------------------------------------------------------------------


def test_compute_bound_has_nothing_to_gain():
    advice = judge(gpu(batch(8, phases(0.1, 0.2, 1, 0.2), overlaps=overlaps(1.4, 1, 1))))
    assert advice.summary.startswith("Best here: batches of 8, 8,000 items/s, compute-bound: compute takes 1.000 ms")
    assert "Nothing to gain here but by a faster engine" in advice.summary
    assert judge(cpu(batch(8, phases(0, 0, 1, 0)))).summary.endswith("the rest less. Nothing to gain here.")


def test_the_summary_is_of_the_fastest_size_and_names_the_first_remedy():
    slow, fast = batch(1, phases(0.1, 4, 1, 0.1)), batch(8, phases(0.1, 8, 4, 0.1))
    summary = judge(gpu(slow, fast)).summary
    assert summary.startswith("Best here: batches of 8, ")
    assert summary.endswith("First: fewer bytes: fp16 inputs and outputs, --io fp16 (2.00x, estimated).")


def test_times_of_nothing_divide_by_nothing():
    nothing = batch(1, phases(0, 0, 0, 0), 0, 0, overlaps=overlaps(0, 0), pageable=phases(0, 0, 0, 0))
    advice = judge(gpu(nothing, bus=bus(rate=1e30)))
    assert isinstance(advice, Advice)
    assert gains(advice.verdicts[0]) == {"gpu": 2.0}


def test_advice_survives_json():
    advice = judge(gpu(batch(8, phases(0.1, 4, 1, 0.1))))
    assert msgspec.json.decode(msgspec.json.encode(advice), type=Advice) == advice
    assert constant(1).variation == 0
    assert FLOATS.item_bytes == 8000
