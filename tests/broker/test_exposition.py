"""What Prometheus is told of a pool, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.broker.core_rig import MS, Rig, sent
from trtpool.broker.exposition import Figures
from trtpool.broker.reporting import report
from trtpool.ipc import messages as m

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def scrape(rig: Rig) -> dict[str, Metric]:
    """What a scrape says, read back as Prometheus reads it."""
    registry = CollectorRegistry()
    registry.register(Figures(report(rig.core)))
    return {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}


@pytest.fixture
def rig() -> Rig:
    """Batches of 3 items, of 2 ms, that waited 5 ms, on either of two GPUs."""
    rig = Rig((16, 1, 4), gpus=2)
    rig.join(1)
    for gpu in range(2):
        rig.worker(10 + gpu, lanes=3, gpu=gpu)
        rig.submit(1, 3, gpu=gpu)
        (run,) = sent(rig.turn(5 * MS), m.Run, 10 + gpu)
        rig.now_ns += 3 * MS
        rig.finish(10 + gpu, run, compute_ns=2 * MS)
    return rig


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    (found,) = [
        one.value
        for family in families.values()
        for one in family.samples
        if one.name == sample and one.labels == labels
    ]
    return found


def test_counts_are_there_by_model_and_gpu(rig):
    now = scrape(rig)
    for gpu in ("0", "1"):
        labels = {"model": "m0", "gpu": gpu}
        assert value(now, "trtpool_items_total", **labels) == 3
        assert value(now, "trtpool_batches_total", **labels) == 1
        assert value(now, "trtpool_compute_seconds_sum", **labels) == pytest.approx(0.002)
        assert value(now, "trtpool_queue_seconds_count", **labels) == 3
        assert value(now, "trtpool_request_seconds_sum", **labels) == pytest.approx(3 * 0.008)
        assert value(now, "trtpool_batch_items_sum", **labels) == 3
        assert value(now, "trtpool_copied_bytes_total", direction="in", **labels) == 3 * 8
        assert value(now, "trtpool_copied_bytes_total", direction="out", **labels) == 3 * 4
        assert value(now, "trtpool_lanes", gpu=gpu) == 3
    assert value(now, "trtpool_slots", model="m0", state="done") == 6
    assert value(now, "trtpool_slots", model="m0", state="free") == 10
    assert value(now, "trtpool_class_items_total", model="m0", priority="bulk") == 6


def histograms(families: dict[str, Metric]) -> Iterator[tuple[str, list[float], list[float], float]]:
    for family in families.values():
        if family.type == "histogram":
            series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
            for sample in family.samples:
                labels = dict(sample.labels)
                if sample.name.endswith("_bucket"):
                    bound = float(labels.pop("le"))
                    series.setdefault(tuple(labels.items()), []).append((bound, sample.value))
            for labels_of, buckets in series.items():
                count = value(families, family.name + "_count", **dict(labels_of))
                yield family.name, [bound for bound, _ in buckets], [seen for _, seen in buckets], count


def test_buckets_rise_and_end_with_all(rig):
    seen = list(histograms(scrape(rig)))
    assert len(seen) == 7 * 2 + 1
    for name, bounds, counts, count in seen:
        assert bounds == sorted(bounds), name
        assert counts == sorted(counts), name
        assert (bounds[-1], counts[-1]) == (float("inf"), count), name


def test_a_time_is_in_the_buckets_above_it(rig):
    (buckets,) = [
        dict(zip(bounds, counts, strict=True))
        for name, bounds, counts, _ in list(histograms(scrape(rig)))[:]
        if name == "trtpool_queue_seconds"
    ][:1]
    assert {bound < 0.005 for bound, count in buckets.items() if not count} == {True}
    assert min(bound for bound, count in buckets.items() if count) == pytest.approx(2**23 / 1e9)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9])
def test_a_size_of_a_batch_is_in_the_bucket_of_its_bound(size):
    rig = Rig((32, 1, 16))
    rig.join(1)
    rig.worker()
    rig.submit(1, size)
    (run,) = sent(rig.turn(), m.Run)
    rig.finish(10, run)
    now = scrape(rig)
    bounds = [bound for name, bounds, _, _ in histograms(now) if name == "trtpool_batch_items" for bound in bounds[:-1]]
    assert bounds[:5] == [1, 2, 4, 8, 16]
    for bound in bounds:
        assert value(now, "trtpool_batch_items_bucket", model="m0", gpu="cpu", le=repr(bound)) == (size <= bound), bound


def test_on_the_cpu_nothing_is_copied_to_a_gpu():
    rig = Rig()
    rig.join(1)
    rig.worker()
    rig.submit(1)
    (run,) = sent(rig.turn(), m.Run)
    rig.finish(10, run)
    now = scrape(rig)
    assert value(now, "trtpool_items_total", model="m0", gpu="cpu") == 1
    assert not now["trtpool_copied_bytes"].samples


def test_names_follow_the_conventions(rig):
    """Base units, at the end; counters say that they are totals."""
    for name, family in scrape(rig).items():
        assert re.fullmatch(r"trtpool(_[a-z]+)+", name), name
        assert not re.search(r"_(ms|us|ns|kb|percent)\b", name), name
        assert family.documentation.endswith("."), name
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{name}_total"}


def test_a_pool_that_did_nothing_yet_can_be_scraped():
    now = scrape(Rig())
    assert value(now, "trtpool_slots", model="m0", state="free") == 16
    assert value(now, "trtpool_workers", gpu="cpu") == 0


# --- The dashboard -------------------------------------------------------------------------------


def test_the_dashboard_shows_only_metrics_that_there_are(rig):
    dashboard = json.loads(DASHBOARD.read_text())
    families = scrape(rig)
    known = {sample.name for family in families.values() for sample in family.samples}
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used = set(re.findall(r"\btrtpool_\w+", target["expr"]))
            assert used, panel["title"]
            assert used <= known, panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")"), panel["title"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            assert set(re.findall(r"\btrtpool_\w+", variable["query"]["query"])) <= known


def test_the_dashboard_uses_labels_that_there_are(rig):
    families = scrape(rig)
    labels = {sample.name: set(sample.labels) for family in families.values() for sample in family.samples}
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name, matchers in re.findall(r"(trtpool_\w+)\{(.*?)\}", target["expr"]):
                assert set(re.findall(r"(\w+)=~", matchers)) <= labels[name] | {"job"}, panel["title"]
            shown = {
                field
                for _, field, _, _ in string.Formatter().parse(
                    target["legendFormat"].replace("{{", "{").replace("}}", "}")
                )
                if field
            }
            everywhere = set().union(*(labels[name] for name in re.findall(r"\btrtpool_\w+", target["expr"])))
            assert shown <= everywhere, panel["title"]


def test_the_dashboard_has_what_grafana_asks_for():
    dashboard = json.loads(DASHBOARD.read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(ids), "panels lie upon each other"
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])
