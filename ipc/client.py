"""The client: what a producer process uses to lease slots, submit them and read results."""

from __future__ import annotations

import operator
import warnings
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import InvalidInput
from .handles import Lease, Leases
from .inference import Inference, Job
from .inflight import check_priority
from .layout import ModelLayout
from .mapping import Mapper
from .report import PoolReport
from .session import Session
from .settings import DEFAULT_TRANSPORT, Priority
from .streams import Stream
from .tensors import check_array

if TYPE_CHECKING:
    from .remote import PoolHandle

T = TypeVar("T")
ClientT = TypeVar("ClientT", bound="Client")

STATUS_TIMEOUT_S = 10.0


class Client:
    """A connection to a running pool, made by `trtpool.connect`; a context manager that closes it.

    Threads may share one.  A forked child may not use its parent's: it raises `ForkedClient`, and `handle` gives
    something that connects by itself in each process.

    Attributes:
        run_dir: the pool's run directory.
        transport: what carries the messages.
        busy_poll: spin while waiting, see `trtpool.connect`.
    """

    def __init__(self, run_dir: Path, transport: str = DEFAULT_TRANSPORT, *, busy_poll: bool | None = None) -> None:
        self._session: Session | None = None  # for __del__, if connecting fails
        self.run_dir = run_dir
        self.transport = transport
        self.busy_poll = busy_poll
        self._session = Session(run_dir, transport, busy_poll)

    @property
    def session(self) -> Session:
        """The connection's inside, for trtpool's own use."""
        if self._session is None:
            raise InvalidInput("this client never connected")
        return self._session

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.session.pool

    @property
    def models(self) -> tuple[ModelLayout, ...]:
        """The pool's models: ``spec`` with names, dtypes and item shapes, `slots`, `items_per_slot`, `max_batch`."""
        return self.session.layout.models

    def model_index(self, name: str | None) -> int:
        """The number of a model; None is the pool's only one.

        Raises:
            InvalidInput: there is none of that name, or there are several and none was named.
        """
        names = [model.spec.name for model in self.models]
        if name is None and len(names) == 1:
            return 0
        if name is None:
            raise InvalidInput(f"this pool has several models; name one with model=: {', '.join(names)}")
        if name not in names:
            raise InvalidInput(f"this pool has no model {name!r}; it has {', '.join(names)}")
        return names.index(name)

    def lease(self, *, model: str | None = None, timeout_s: float | None = None, priority: Priority = "bulk") -> Lease:
        """Lease one slot to write; use it in a ``with`` statement.

        Args:
            model: which model's; not needed when the pool has one.
            timeout_s: seconds to wait for one to come free; None waits as long as it takes, 0 not at all.
            priority: "interactive" goes before "bulk", in the wait for slots and, unless `submit` says otherwise, in
                the queue.  Bulk keeps a fifth of the batches and of the grants.

        Raises:
            PoolBusy: none came free in time.
            LeaseTooLarge: this client's only thread holds all that it may hold, so waiting could not end.
            PoolClosed: the pool has ended or is stopping.
            ForkedClient: this process forked from the one that connected.
        """
        claims = self.session.requests.claim(self.model_index(model), 1, timeout_s, check_priority(priority))
        return Lease(claims[0], single=True)

    def lease_many(
        self, count: int, *, model: str | None = None, timeout_s: float | None = None, priority: Priority = "bulk"
    ) -> Leases:
        """Lease `count` slots, all or none; they come as few runs of adjacent slots, usually one.

        Raises:
            LeaseTooLarge: more than this client may hold.
            PoolBusy, PoolClosed, ForkedClient: see `lease`.
        """
        count = operator.index(count)
        if count < 1:
            raise InvalidInput(f"lease_many() takes a count of at least 1, got {count}")
        claims = self.session.requests.claim(self.model_index(model), count, timeout_s, check_priority(priority))
        return Leases(Lease(claim, single=False) for claim in claims)

    def infer(
        self,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        gpu: int | None = None,
        priority: Priority = "bulk",
        **arrays: npt.ArrayLike,
    ) -> dict[str, npt.NDArray[Any]]:
        """Run one item, or an array of items, and return copies of the outputs: ``pool.infer(x=array)``.

        The convenient way, with one copy in and one out.  Where those matter, write into slots.

        Args:
            inputs: arrays by tensor name, or give them as keyword arguments.  Each has the item's shape, or all
                have one more axis in front, of any length.  Where the model allows several shapes any of them will do,
                one in a call; an input that a batch shares has its own shape and no axis more.
            model: see `lease`.
            timeout_s: seconds for each step: waiting for slots, and for each result.
            gpu: see `Lease.submit`.
            priority: see `lease`.

        Returns:
            Output arrays by name, with the same axis in front, if any.

        Raises:
            InvalidInput: a missing or unknown name, a wrong shape or dtype, no such GPU; or the items' outputs have
                different shapes, since these depend on what is in the inputs.
            PoolBusy, PoolClosed: see `lease`.
            WorkError: an item failed; `index` says which.
            TimeoutError: a result did not come in time.
        """
        index = self.model_index(model)
        layout = self.models[index]
        checked, items = _check_inputs(layout, {**(inputs or {}), **arrays})
        job = Job(checked, layout, 1 if items is None else items, None)
        for _ in Inference(self.session, index, [job], timeout_s, gpu, priority).run():
            pass
        return job.outputs if items is not None else {name: array[0, ...] for name, array in job.outputs.items()}

    def map(
        self,
        write: Callable[[T, Mapping[str, npt.NDArray[Any]]], object],
        items: Iterable[T] | AsyncIterable[T],
        *,
        window: int = 64,
        ordered: bool = True,
        model: str | None = None,
        timeout_s: float | None = None,
        return_exceptions: bool = False,
        gpu: int | None = None,
        priority: Priority = "bulk",
    ) -> Stream[T]:
        """Stream items through the pool: ``for item, result in pool.map(write, items): ...``.

        Nothing is done before the first is asked for.  Then slots are written ahead of the reader, up to `window`: a
        reader that is slow holds back the reading of `items`, and a pool that is busy does too.

        ``async for`` reads it as well, and then takes async iterables too.  `items`, unless they are one, and `write`
        are then used in a thread, so that the loop goes on.

        Args:
            write: called as ``write(item, inputs)`` to write an item into a slot's input arrays, by name.  Where slots
                hold several items, `item` is whatever fills one slot, and a returned int says how many it wrote.
                Where items differ in shape, ``inputs["x"] = item`` and ``inputs.shaped("x", shape)`` say which this
                one has.
            items: any iterable; read as slots come free.  While it waits for an item of its own, results that are there
                wait too; in an ``async for`` over an async iterable they do not.
            window: slots that are written or in flight at once; more than the client's cap is cut to it.
            ordered: yield in the order of `items`; else as they end.
            model: see `lease`.
            timeout_s: seconds to wait for each lease and each result.
            return_exceptions: yield the error of an item that failed in place of its result: its `WorkError`, or what
                `write` raised for it.
            gpu: see `Lease.submit`.
            priority: see `lease`.

        Yields:
            The item and its `Result`, whose arrays are valid until the next one is asked for: copy what you keep.
            An array that is kept all the same stays as it is, and keeps its slots from the pool.

        Raises:
            WorkError: an item failed and `return_exceptions` is false; `index` and `item` say which.
            Exception: what `items` or `write` raised, when all before it was read; from Python 3.11 on, a note says
                for which item `write` did.
            InvalidInput, PoolBusy, PoolClosed: see `lease`.
        """
        if window < 1:
            raise InvalidInput(f"map() takes a window of at least 1, got {window}")
        self.session.check_process()
        index = self.model_index(model)
        self.session.check_gpu(gpu)
        check_priority(priority)
        make = partial(
            Mapper,
            self.session,
            index,
            write,
            window=window,
            ordered=ordered,
            timeout_s=timeout_s,
            return_exceptions=return_exceptions,
            gpu=gpu,
            priority=priority,
        )
        return Stream(self.session, items, make)

    def status(self) -> PoolReport:
        """The pool's figures.

        Raises:
            PoolBusy: no answer within 10 s.
            PoolClosed: the pool ended.
        """
        return msgspec.json.decode(self.session.requests.report(STATUS_TIMEOUT_S), type=PoolReport)

    def handle(self) -> PoolHandle:
        """Something that can be pickled, or carried over a fork, and connects by itself, once in each process."""
        from .remote import PoolHandle

        return PoolHandle(self.run_dir, self.transport, busy_poll=self.busy_poll)

    def close(self) -> None:
        """Disconnect.

        Slots that were not released by now, or that arrays still view, come free when this process ends.
        """
        if self._session is not None:
            self._session.close()

    def __enter__(self: ClientT) -> ClientT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None and not (session.closed or session.forked):
            text = f"{self!r} was dropped without close(); use `with trtpool.connect() as pool:`"
            warnings.warn(text, ResourceWarning, stacklevel=2)
            session.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a connected client cannot be pickled; give the other process pool.handle()")

    def __repr__(self) -> str:
        if self._session is None:
            return f"<{type(self).__name__}, not connected>"
        state = "closed" if self._session.closed else "connected"
        return f"<{type(self).__name__} of pool {self.name!r}, {state}>"


def _check_inputs(
    layout: ModelLayout, given: dict[str, npt.ArrayLike]
) -> tuple[dict[str, npt.NDArray[Any]], int | None]:
    """The inputs as arrays whose first axis counts items, and how many, or None for a single item without the axis."""
    specs = {spec.name: spec for spec in layout.spec.inputs}
    if set(given) != set(specs):
        raise InvalidInput(
            f"model {layout.spec.name!r} has the inputs {', '.join(specs)}, got {', '.join(given) or 'none'}"
        )
    first = next((spec for spec in layout.spec.inputs if not spec.shared), layout.spec.inputs[0])
    try:
        shape = np.shape(given[first.name])
    except ValueError:  # rows of different lengths; `check_array` says so
        shape = first.shape
    is_one = shape == first.shape or (first.least is not None and len(shape) == len(first.shape))
    items = None if is_one else shape[0] if shape else 0
    leading = () if items is None else (items,)
    arrays = {name: check_array(spec, given[name], () if spec.shared else leading) for name, spec in specs.items()}
    if items is None:
        return {name: array if specs[name].shared else array[None] for name, array in arrays.items()}, items
    return arrays, items
