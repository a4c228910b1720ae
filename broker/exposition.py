"""The pool's figures as Prometheus wants them: names with units, counters that end in ``_total``, seconds and bytes.

Made from one `PoolReport` at each scrape.  A `gpu` label is the pool's number for the GPU, "cpu" on the CPU, "all"
where the report has them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from trtpool import __version__
from trtpool.ipc.histogram import Histogram, upper
from trtpool.ipc.report import DeviceReport, ModelReport, PoolReport

Metric = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily | InfoMetricFamily

STATES: Final = ("free", "leased", "queued", "running", "done")

_TIME_BUCKETS: Final = range(24, 74, 2)
"""Doublings of 4.096 us, up to 69 s."""

_PHASES: Final = (
    ("queue", "queue_seconds", "Items, from arrival until their batch was sent to a worker."),
    ("dispatch", "dispatch_seconds", "Batches with a worker and not on its device: messages, and the wait for a lane."),
    ("copy_in", "copy_in_seconds", "Copies of a batch's inputs to the GPU; on the CPU, gathers of scattered rows."),
    ("compute", "compute_seconds", "Runs of the engine, for each batch."),
    ("copy_out", "copy_out_seconds", "Copies of a batch's outputs from the GPU; on the CPU, scatters."),
    ("latency", "request_seconds", "Items, from arrival until the broker knew their outputs to be written."),
)


class Figures(Collector):
    """One report, for one scrape.

    Args:
        report: of the pool.
    """

    def __init__(self, report: PoolReport) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        yield from self._of_the_pool()
        yield from self._of_workers()
        for make in (self._slots, self._waits, self._counts, self._classes, self._devices, self._copied, self._times):
            yield from make()

    # ------------------------------------------------------------------ the pool

    def _of_the_pool(self) -> Iterator[Metric]:
        now = self._report
        info = {"pool": now.name, "version": __version__}
        yield InfoMetricFamily("trtpool_pool", "The pool and its version.", info)
        for name, text, value in (
            ("uptime_seconds", "Since the broker started.", now.uptime_s),
            ("arena_bytes", "Shared memory of all slots.", now.arena_bytes),
            ("clients", "Connected clients, but for the one that serves these figures.", max(0, now.producers - 1)),
            ("draining", "1: no more slots are granted, and the pool ends when its work has.", now.draining),
        ):
            yield GaugeMetricFamily(f"trtpool_{name}", text, value)
        for name, text, value in (
            ("protocol_violations", "Messages that no client or worker of trtpool's sends.", now.violations),
            ("broker_restarts", "Brokers that took over from another.", now.epoch - 1),
            ("worker_ends", "Workers that ended for whatever reason; others were started.", now.worker_ends),
        ):
            yield CounterMetricFamily(f"trtpool_{name}", text, value)

    def _of_workers(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("trtpool_workers", "Workers that are ready.", labels=["gpu"])
        lanes = GaugeMetricFamily("trtpool_lanes", "Batches that workers can have in flight.", labels=["gpu"])
        flights = GaugeMetricFamily("trtpool_batches_in_flight", "Batches that workers have.", labels=["gpu"])
        for gpu in sorted({_gpu(worker.gpu) for worker in self._report.workers}) or ["cpu"]:
            here = [worker for worker in self._report.workers if _gpu(worker.gpu) == gpu]
            workers.add_metric([gpu], len(here))
            lanes.add_metric([gpu], sum(worker.lanes for worker in here))
            flights.add_metric([gpu], sum(worker.batches_in_flight for worker in here))
        yield from (workers, lanes, flights)

    # ------------------------------------------------------------------ models

    def _slots(self) -> Iterator[Metric]:
        slots = GaugeMetricFamily("trtpool_slots", "Slots in each state.", labels=["model", "state"])
        for model in self._report.models:
            for state in STATES:
                slots.add_metric([model.name, state], getattr(model, state))
        yield slots

    def _waits(self) -> Iterator[Metric]:
        waits = HistogramMetricFamily(
            "trtpool_lease_wait_seconds", "Requests for slots, from arrival to grant.", labels=["model"]
        )
        for model in self._report.models:
            waits.add_metric([model.name], *_seconds(model.leases))
        yield waits

    def _counts(self) -> Iterator[Metric]:
        for field, name, text in (
            ("failed_items", "failed_items", "Items that ended with an error of any kind."),
            ("runs", "runs", "Runs of adjacent slots in finished batches."),
            ("gathered_items", "gathered_items", "Items copied through scratch memory, since they were small."),
            ("retries", "retried_batches", "Batches that went back to the queue."),
            ("overdue", "overdue_recalls", "Recalls that a client did not answer in time."),
            ("evicted", "evicted_processes", "Processes that were ended for that."),
        ):
            counter = CounterMetricFamily(f"trtpool_{name}", text, labels=["model"])
            for model in self._report.models:
                counter.add_metric([model.name], getattr(model, field))
            yield counter

    def _classes(self) -> Iterator[Metric]:
        labels = ["model", "priority"]
        queued = GaugeMetricFamily("trtpool_queued_slots", "Slots in the queue.", labels=labels)
        waiting = GaugeMetricFamily("trtpool_lease_requests_waiting", "Requests that wait for slots.", labels=labels)
        items = CounterMetricFamily("trtpool_class_items", "Items that ended with a result.", labels=labels)
        for model in self._report.models:
            for priority, one in (("interactive", model.interactive), ("bulk", model.bulk)):
                queued.add_metric([model.name, priority], one.queued)
                waiting.add_metric([model.name, priority], one.waiting)
                items.add_metric([model.name, priority], one.items)
        yield from (queued, waiting, items)

    # ------------------------------------------------------------------ models on devices

    def _each_device(self) -> Iterator[tuple[ModelReport, DeviceReport, list[str]]]:
        for model in self._report.models:
            for device in model.devices:
                yield model, device, [model.name, _gpu(device.gpu)]

    def _devices(self) -> Iterator[Metric]:
        labels = ["model", "gpu"]
        items = CounterMetricFamily("trtpool_items", "Items that ended with a result.", labels=labels)
        batches = CounterMetricFamily("trtpool_batches", "Batches that ended.", labels=labels)
        sizes = HistogramMetricFamily("trtpool_batch_items", "Items of a batch.", labels=labels)
        for _, device, names in self._each_device():
            items.add_metric(names, device.items)
            batches.add_metric(names, device.batches)
            sizes.add_metric(names, *_sizes(device.sizes))
        yield from (items, batches, sizes)

    def _copied(self) -> Iterator[Metric]:
        copied = CounterMetricFamily(
            "trtpool_copied_bytes", "Inputs to GPUs and outputs from them.", labels=["model", "gpu", "direction"]
        )
        for _, device, names in self._each_device():
            if device.gpu is not None:
                copied.add_metric([*names, "in"], device.copied_in_bytes)
                copied.add_metric([*names, "out"], device.copied_out_bytes)
        yield copied

    def _times(self) -> Iterator[Metric]:
        for field, name, text in _PHASES:
            family = HistogramMetricFamily(f"trtpool_{name}", text, labels=["model", "gpu"])
            for _, device, names in self._each_device():
                family.add_metric(names, *_seconds(getattr(device, field)))
            yield family


def _gpu(number: int | None) -> str:
    return "cpu" if number is None else "all" if number < 0 else str(number)


def _seconds(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Buckets and sum of nanoseconds, in seconds."""
    bounds = [(bucket, upper(bucket) / 1e9) for bucket in _TIME_BUCKETS]
    return _cumulative(histogram, bounds), histogram.total / 1e9


def _sizes(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Buckets and sum of items, of which the histogram has one less."""
    bounds = [(bucket, float(2 ** (bucket // 2))) for bucket in range(0, 26, 2)]
    return _cumulative(histogram, bounds), histogram.total + histogram.count


def _cumulative(histogram: Histogram, bounds: list[tuple[int, float]]) -> list[tuple[str, float]]:
    """As Prometheus has buckets: each with all below its bound; `bounds` are the last bucket below each, and it."""
    dense = histogram.dense()
    buckets = [(repr(bound), float(sum(dense[: bucket + 1]))) for bucket, bound in bounds]
    return [*buckets, ("+Inf", float(histogram.count))]
