"""Arrow tables through a pool: `infer`, `map_batches`, and `fill` and `view` for those who lease slots themselves.

No Python code runs for a row.  The copies that there are::

    Arrow buffer --NumPy--> slots --engine--> slots --NumPy--> Arrow buffer     infer, map_batches
    Arrow buffer --NumPy--> slots --engine--> slots                             fill, view

`view` is safe without a copy because of how slots go back (`trtpool.ipc.claims`): the buffers of what it gives hold
the root array of the lease, so the slots stay this client's until the last of them has ended.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .arrow_columns import column_of, items_of, pyarrow
from .client import Client
from .errors import InvalidInput, WorkError
from .handles import Lease, Result
from .inference import Inference, Job
from .layout import ModelLayout
from .remote import PoolHandle
from .settings import Priority

if TYPE_CHECKING:
    import pyarrow as pa

OnError: TypeAlias = Literal["raise", "null"]

ERROR_COLUMN = "error"
"""Where ``on_error="null"`` says why."""


def infer(
    pool: Client | PoolHandle,
    table: pa.RecordBatch | pa.Table,
    *,
    model: str | None = None,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] | None = None,
    on_error: OnError = "raise",
    timeout_s: float | None = None,
    gpu: int | None = None,
    priority: Priority = "bulk",
) -> Any:
    """Run each row of a `RecordBatch` or `Table` as an item: ``out = trtpool.arrow.infer(pool, batch)``.

    Columns may be numbers (items of one number), fixed-size lists, lists of one length, fixed-shape tensors, or binary
    of one length, with the values of an item in row-major order and the tensor's dtype; nothing is converted silently.

    Args:
        pool: a client, a pool, or a handle.
        table: the rows; any number.
        model: which model; not needed when the pool has one.
        columns: the column for each input, by the input's name; by default that of the same name.
        keep: columns of `table` to pass on, which copies nothing; by default all but the inputs.
        on_error: "raise" the first `WorkError`, or "null": rows that failed have null outputs, and say why in a string
            column ``error``.
        timeout_s: seconds for each step: waiting for slots, and for each result.
        gpu, priority: see `Client.infer`.

    Returns:
        The kind that was given: columns that were kept, then one for each output: numbers, fixed-size lists for items
        of one axis, fixed-shape tensors for more.

    Raises:
        MissingExtra: pyarrow is not installed.
        InvalidInput: no such column, or one with nulls, another dtype or another shape; a name that comes twice; or a
            model whose items differ in shape or share inputs.
        WorkError: a row failed; `index` says which of its record batch.
        PoolBusy, PoolClosed, TimeoutError: see `Client.infer`.
    """
    arrow = pyarrow()
    batches = table.to_batches() if isinstance(table, arrow.Table) else [table]
    if not batches:
        batches = [arrow.RecordBatch.from_pylist([], schema=table.schema)]
    done = list(
        map_batches(
            pool,
            batches,
            model=model,
            columns=columns,
            keep=keep,
            on_error=on_error,
            timeout_s=timeout_s,
            gpu=gpu,
            priority=priority,
        )
    )
    return arrow.Table.from_batches(done) if isinstance(table, arrow.Table) else done[0]


def map_batches(
    pool: Client | PoolHandle,
    batches: Iterable[pa.RecordBatch],
    *,
    model: str | None = None,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] | None = None,
    on_error: OnError = "raise",
    timeout_s: float | None = None,
    gpu: int | None = None,
    priority: Priority = "bulk",
) -> Generator[pa.RecordBatch, None, None]:
    """Stream record batches through the pool, in order: for `ParquetFile.iter_batches`, readers, datasets.

    The next ones are written while the last are computed, as far as there are slots: that is the back-pressure.

    Args:
        batches: any iterable of them; a `Table` is one of its own batches.
        pool, model, columns, keep, on_error, timeout_s, gpu, priority: see `infer`.

    Raises:
        As `infer`; `WorkError.index` is a row of the batch that would have come next.
    """
    arrow = pyarrow()
    if on_error not in ("raise", "null"):
        raise InvalidInput(f"on_error={on_error!r} is neither 'raise' nor 'null'")
    client = _client_of(pool)
    index = client.model_index(model)
    layout = client.models[index]
    _check_uniform(layout)
    source = batches.to_batches() if isinstance(batches, arrow.Table) else batches

    def jobs() -> Iterator[Job[pa.RecordBatch]]:
        for batch in source:
            yield Job(_inputs(layout, batch, columns), layout, batch.num_rows, batch)

    def read() -> Generator[pa.RecordBatch, None, None]:
        flow = Inference(client.session, index, jobs(), timeout_s, gpu, priority, partial=on_error == "null")
        for job in flow.run():
            outputs = {name: column_of(array, job.errors) for name, array in job.outputs.items()}
            if on_error == "null":
                outputs[ERROR_COLUMN] = _reasons(job.errors, job.total)
            yield _with_columns(job.tag, layout, columns, keep, outputs)

    return read()


def fill(lease: Lease, batch: pa.RecordBatch, *, columns: Mapping[str, str] | None = None) -> int:
    """Write the rows of a batch into leased slots, from the first: ``lease.submit(items=fill(lease, batch))``.

    Args:
        lease: a run of slots from `lease_many`, or one slot.
        batch: at most as many rows as the slots hold items.
        columns: see `infer`.

    Returns:
        The number of rows.

    Raises:
        InvalidInput: more rows than there is room for, or columns that do not fit; see `infer`.
        SpentHandle: the lease was submitted or released.
    """
    layout = lease.model
    _check_uniform(layout)
    rows: int = batch.num_rows
    room = lease.count * layout.items_per_slot
    if rows > room:
        raise InvalidInput(f"{rows} rows do not fit into {lease.count} slots, which hold {room} items; slice the batch")
    for name, items in _inputs(layout, batch, columns).items():
        _as_items(lease.inputs[name], items.shape[1:])[:rows] = items
    return rows


def view(result: Result) -> pa.RecordBatch:
    """The outputs of a result as a record batch over the slots themselves: no copy, but for booleans.

    The slots go back when the result was released *and* the batch, its columns and all slices of them have ended:
    whoever keeps many of these keeps the pool's slots, and copies of what is kept are then better (`infer`).

    Raises:
        MissingExtra: pyarrow is not installed.
        SpentHandle: the slots were released.
    """
    layout = result.model
    _check_uniform(layout)
    columns = {
        spec.name: column_of(_as_items(result.outputs[spec.name], spec.shape)[: result.items])
        for spec in layout.spec.outputs
    }
    return pyarrow().RecordBatch.from_pydict(columns)


def _client_of(pool: Client | PoolHandle) -> Client:
    return pool.client if isinstance(pool, PoolHandle) else pool


def _as_items(array: npt.NDArray[Any], item_shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array of slots, or of one, as an array of items."""
    return array.reshape(-1, *item_shape)


def _column_names(layout: ModelLayout, columns: Mapping[str, str] | None) -> dict[str, str]:
    names = {spec.name: spec.name for spec in layout.spec.inputs}
    if unknown := set(columns or ()) - set(names):
        raise InvalidInput(
            f"model {layout.spec.name!r} has no input {', '.join(sorted(unknown))}; it has {', '.join(names)}"
        )
    return {**names, **(columns or {})}


def _check_uniform(layout: ModelLayout) -> None:
    if not layout.spec.is_uniform:
        raise InvalidInput(
            f"model {layout.spec.name!r} has items of several shapes, or shares inputs between items, which columns "
            "do not say; use Client.map or Client.infer"
        )


def _inputs(
    layout: ModelLayout, batch: pa.RecordBatch, columns: Mapping[str, str] | None
) -> dict[str, npt.NDArray[Any]]:
    names = _column_names(layout, columns)
    for input_name, name in names.items():
        if batch.schema.get_field_index(name) < 0:
            raise InvalidInput(
                f"there is no one column {name!r} for input {input_name!r}; name the column with "
                f"columns={{{input_name!r}: ...}}, out of {', '.join(batch.schema.names)}"
            )
    return {spec.name: items_of(spec, batch.column(names[spec.name]), names[spec.name]) for spec in layout.spec.inputs}


def _with_columns(
    batch: pa.RecordBatch,
    layout: ModelLayout,
    columns: Mapping[str, str] | None,
    keep: Sequence[str] | None,
    outputs: Mapping[str, pa.Array],
) -> pa.RecordBatch:
    inputs = set(_column_names(layout, columns).values())
    kept = [name for name in batch.schema.names if name not in inputs] if keep is None else list(keep)
    if missing := set(kept) - set(batch.schema.names):
        raise InvalidInput(f"there is no column {', '.join(sorted(missing))} to keep")
    if twice := set(kept) & set(outputs):
        raise InvalidInput(
            f"column {', '.join(sorted(twice))} would come twice, as it was and out of the model; "
            "say with keep= which columns to pass on, or rename it"
        )
    arrow = pyarrow()
    fields = [batch.schema.field(name) for name in kept]
    schema = arrow.schema([*fields, *(arrow.field(name, column.type) for name, column in outputs.items())])
    return arrow.RecordBatch.from_arrays([*map(batch.column, kept), *outputs.values()], schema=schema)


def _reasons(errors: Mapping[int, WorkError], rows: int) -> pa.Array:
    """A string for each row that failed; the loop is over those alone."""
    arrow = pyarrow()
    if not errors:
        return arrow.nulls(rows, arrow.string())
    failed = list(errors)
    places, succeeded = np.zeros(rows, np.int64), np.ones(rows, bool)
    places[failed], succeeded[failed] = range(len(failed)), False
    texts = arrow.array([f"{type(error).__name__}: {error.args[0]}" for error in errors.values()], arrow.string())
    return texts.take(arrow.array(places, mask=succeeded))
