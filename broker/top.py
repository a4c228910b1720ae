"""`trtpool top`: what a pool is doing, from the difference of two reports.

::

    pool, workers, clients, restarts
    models    items/s, items a batch, percentiles of the time from arrival to end, what failed
    times     where that time goes: mean of each phase
    slots     of each model, by state, and requests that wait for some
    devices   workers, batches in flight, how much of the time they compute, bytes copied, the driver's own figures
    clients   items/s, leases, slots

Each table fits 80 columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.histogram import Histogram
from trtpool.ipc.report import ClientReport, DeviceReport, ModelReport, PoolReport, WorkerReport

from .nvml import GpuFigures

STATES: Final = ("free", "leased", "queued", "running", "done")
PHASES: Final = ("queue", "dispatch", "copy_in", "compute", "copy_out")


class Look(NamedTuple):
    """A report, and when it came, by the monotonic clock; `gpus` has the driver's figures by worker process."""

    report: PoolReport
    at_s: float
    gpus: Mapping[int, GpuFigures] = {}


class Top:
    """What is shown for two looks, one after the other.

    Args:
        before, now: the looks.
    """

    def __init__(self, before: Look, now: Look) -> None:
        self._now, self._gpus = now.report, now.gpus
        self._passed_s = max(1e-9, now.at_s - before.at_s)
        self._models = {model.name: model for model in before.report.models}
        self._clients = {client.peer: client.items for client in before.report.clients}
        self._done = {model.name: self._since(model) for model in now.report.models}

    def show(self, rows: int) -> RenderableType:
        """All of it, in about so many rows: of the clients, those that had most done."""
        tables = [self._model_table(), self._time_table(), self._slot_table(), self._device_table()]
        taken = 2 + sum(table.row_count + 3 for table in [*tables, _table("clients")])
        tables.append(self._client_table(max(3, rows - taken)))
        return Group(self._header(), *(part for table in tables for part in ("", table)))

    def _since(self, model: ModelReport) -> list[DeviceReport]:
        """What was done by each device since the look before."""
        known = {device.gpu: device for device in self._models[model.name].devices}
        return [_minus(device, known.get(device.gpu)) for device in model.devices]

    # ------------------------------------------------------------------ parts

    def _header(self) -> Text:
        now = self._now
        state = "draining" if now.draining else "serving"
        others = max(0, now.producers - 1)
        return Text.assemble(
            ("trtpool ", "bold"),
            (now.name, "bold cyan"),
            f"  {state} {now.uptime_s:,.0f} s, {len(now.workers)} workers, {others} clients, "
            f"arena {format_bytes(now.arena_bytes)}\n"
            f"restarts: {now.epoch - 1} broker, {now.worker_ends} workers; {now.violations} protocol violations",
            overflow="ellipsis",
        )

    def _model_table(self) -> Table:
        table = _table("model", "items/s", "batch", "p50 ms", "p90 ms", "p99 ms", "failed", "retried")
        for model in self._now.models:
            done = self._done[model.name]
            latency = _merge(one.latency for one in done)
            items, batches = sum(one.items for one in done), sum(one.batches for one in done)
            percentiles = [_ms(latency.quantile(q)) if latency.counts else "-" for q in (0.5, 0.9, 0.99)]
            batch = f"{items / batches:.1f}" if batches else "-"
            failed, retried = f"{model.failed_items:,}", f"{model.retries:,}"
            table.add_row(model.name, self._rate(items), batch, *percentiles, failed, retried)
        return table

    def _slot_table(self) -> Table:
        table = _table("slots", *STATES, "of", "leases wait")
        for model in self._now.models:
            states = [f"{getattr(model, state):,}" for state in STATES]
            table.add_row(model.name, *states, f"{model.slots:,}", f"{model.waiting:,}")
        return table

    def _time_table(self) -> Table:
        table = _table("mean, ms", "lease", *(phase.replace("_", " ") for phase in PHASES), "in all")
        for model in self._now.models:
            done = self._done[model.name]
            leases = model.leases - self._models[model.name].leases
            phases = [_merge(getattr(one, phase) for one in done) for phase in (*PHASES, "latency")]
            table.add_row(model.name, *(_ms(one.mean) if one.counts else "-" for one in (leases, *phases)))
        return table

    def _device_table(self) -> Table:
        table = _table("device", "workers", "in flight", "computes", "in /s", "out /s", "busy", "memory")
        for gpu, workers in _by_gpu(self._now.workers).items():
            compute_ns, copied_in, copied_out = self._work_of(gpu)
            share = compute_ns / 1e9 / self._passed_s / (len(workers) if gpu is None else 1)
            figures = next((self._gpus[one.pid] for one in workers if one.pid in self._gpus), None)
            copies = [_bytes_a_s(one / self._passed_s) if gpu is not None else "-" for one in (copied_in, copied_out)]
            driver = ["-", "-"]
            if figures is not None:
                used, total = figures.used_bytes / 2**30, figures.total_bytes / 2**30
                driver = [f"{figures.busy_percent} %", f"{used:.1f}/{total:.0f}G"]
            flights = f"{sum(one.batches_in_flight for one in workers)}/{sum(one.lanes for one in workers)}"
            name = "cpu" if gpu is None else f"gpu {gpu}"
            table.add_row(name, str(len(workers)), flights, f"{min(1.0, share):.0%}", *copies, *driver)
        return table

    def _work_of(self, gpu: int | None) -> tuple[int, int, int]:
        """Nanoseconds of compute, and bytes in and out, of a device since the look before."""
        compute_ns = copied_in = copied_out = 0
        for devices in self._done.values():
            for device in devices:
                if device.gpu == gpu:
                    compute_ns += device.compute.total
                    copied_in += device.copied_in_bytes
                    copied_out += device.copied_out_bytes
        return compute_ns, copied_in, copied_out

    def _client_table(self, most: int) -> Table:
        clients = sorted(self._others(), key=lambda one: (-self._items_of(one), one.pid))
        table = _table("client", "items/s", "items", "leases", "slots", "waits", caption=_left_out(len(clients) - most))
        for one in clients[:most]:
            rate = self._rate(self._items_of(one))
            leases, waits = str(one.leases), str(one.waiting)
            table.add_row(f"pid {one.pid or '?'}", rate, f"{one.items:,}", leases, str(one.slots), waits)
        return table

    def _others(self) -> list[ClientReport]:
        return [one for one in self._now.clients if one.pid != os.getpid()]

    def _items_of(self, client: ClientReport) -> int:
        """Since the look before; one that came since, or had less done than others, did all it did now."""
        return client.items - self._clients.get(client.peer, 0)

    def _rate(self, items: int) -> str:
        return f"{items / self._passed_s:,.0f}"


def _table(first: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    table.show_edge = False
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=16)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _left_out(clients: int) -> str | None:
    return f"and {clients} more" if clients > 0 else None


def _by_gpu(workers: Iterable[WorkerReport]) -> dict[int | None, list[WorkerReport]]:
    found: dict[int | None, list[WorkerReport]] = {}
    for worker in sorted(workers, key=lambda one: (one.gpu or 0, one.pid)):
        found.setdefault(worker.gpu, []).append(worker)
    return found


def _minus(now: DeviceReport, before: DeviceReport | None) -> DeviceReport:
    if before is None:
        return now
    names = ("items", "batches", "sizes", "latency", *PHASES, "copied_in_bytes", "copied_out_bytes")
    return DeviceReport(now.gpu, **{name: getattr(now, name) - getattr(before, name) for name in names})


def _merge(histograms: Iterable[Histogram]) -> Histogram:
    return sum(histograms, Histogram())


def _ms(nanoseconds: float) -> str:
    """Milliseconds with three digits that say something; minutes and more in seconds, with their unit."""
    value = nanoseconds / 1e6
    if value >= 100_000:
        return f"{value / 1e3:,.0f}s"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _bytes_a_s(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB" if rate >= 1e8 else f"{rate / 1e6:.1f} MB"
