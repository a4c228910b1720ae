"""`trtpool status` for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.report import ClassReport, HolderReport, ModelReport, PoolReport, WorkerReport


def _mean(total: int, count: int, unit: float) -> str:
    return f"{total / count / unit:,.1f}" if count else "-"


def _model_rows(model: ModelReport) -> list[tuple[str, str]]:
    return [
        ("file", model.path),
        ("slots", f"{model.slots:,} of {format_bytes(model.slot_bytes)}, {model.items_per_slot} items each"),
        (
            "now",
            (
                f"{model.free} free, {model.leased} leased, {model.queued} queued, "
                f"{model.running} running, {model.done} done"
            ),
        ),
        ("leases waiting", f"{model.waiting:,}"),
        ("items done / failed", f"{model.items:,} / {model.failed_items:,}"),
        ("batches / retried", f"{model.batches:,} / {model.retries:,}"),
        ("items a batch", f"{_mean(model.items, model.batches, 1)} of at most {model.max_batch}"),
        ("runs a batch", _mean(model.runs, model.batches, 1)),
        ("items gathered", f"{model.gathered_items:,}"),
        ("in the queue", f"{_mean(model.queue_ns, model.items, 1e3)} us an item"),
        ("of which interactive", _class_text(model.interactive)),
        ("of which bulk", _class_text(model.bulk)),
        ("copy in", f"{_mean(model.copy_in_ns, model.batches, 1e3)} us a batch"),
        ("compute", f"{_mean(model.compute_ns, model.batches, 1e3)} us a batch"),
        ("copy out", f"{_mean(model.copy_out_ns, model.batches, 1e3)} us a batch"),
        ("recalls overdue / evicted", f"{model.overdue:,} / {model.evicted:,}"),
    ]


def _class_text(one: ClassReport) -> str:
    return (
        f"{_mean(one.queue_ns, one.items, 1e3)} us an item; {one.queued:,} queued, {one.items:,} done, "
        f"{one.waiting:,} leases waiting"
    )


def _holder_text(one: HolderReport) -> str:
    return (
        f"process {one.pid or '?'} holds of {one.model} {one.leased} leased, {one.queued} queued, "
        f"{one.running} running, {one.done} done; idle for {one.idle_s:,.1f} s"
        + (", OVERDUE: others wait" if one.overdue else "")
    )


def _role(worker: WorkerReport, report: PoolReport) -> str:
    """What an exchange of engines makes of a worker."""
    if worker.generation == report.generation:
        return f", generation {worker.generation}" if worker.generation else ""
    return f", generation {worker.generation}, " + (
        "finishes what it has" if worker.generation < report.generation else "stands by"
    )


def show_report(report: PoolReport) -> None:
    """Print a report as tables."""
    console = Console()
    state = "draining" if report.draining else "serving"
    console.print(
        f"pool [bold]{report.name}[/bold]: {state} for {report.uptime_s:,.0f} s, "
        f"arena {format_bytes(report.arena_bytes)}, "
        f"{report.producers} clients, {report.violations} protocol violations"
    )
    for worker in report.workers:
        place = worker.device if worker.gpu is None else f"gpu {worker.gpu}, {worker.device}"
        console.print(
            f"worker {worker.pid} on {place}: {worker.batches_in_flight} batches in flight{_role(worker, report)}"
        )
    for holder in report.holders:
        console.print(_holder_text(holder))
    for model in report.models:
        table = Table(title=model.name, show_header=False, title_justify="left")
        for name, text in _model_rows(model):
            table.add_row(name, text)
        console.print(table)
