"""A producer of a job: ``python -m trtpool.broker.jobs.produce``, with its configuration as a line on standard input.

It streams the rows of the chunks that it is given through the pool, over the bounds of chunks, and sends each chunk
back when its last row is there.  While it has nothing new to write it reads results, so chunks end however few it has.

Before a function of the user or a decoder touches a row, the row's number is written where the parent can read it: if
this process ends there, the parent knows which row did it.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from trtpool.ipc.client import Client
from trtpool.ipc.errors import ConfigError, TrtpoolError, WorkError
from trtpool.ipc.handles import Result
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import only_answer, tie_to_parent
from trtpool.ipc.remote import connect

from . import columns, wire
from .functions import Arrays, make_decoder, make_post, reason, schema_of
from .images import ImageOptions
from .reading import Item, Reader

_log = logging.getLogger(__name__)

TELL_EVERY_NS: Final = 200_000_000
"""How often what was done is told, for the progress bar."""

MARK: Final = struct.Struct("<q")
"""The row that is being decoded or looked at, plus one; 0: none."""


class ProducerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first line of a producer's standard input, as JSON.

    Attributes:
        parent_pid: the job, with which it ends.
        mark_fd: a memfd of 8 bytes, see `MARK`.
        run_dir: the pool's.
        model: its name.
        kind: of the inputs, see `sources.Inputs`.
        columns: Parquet columns by input.
        decode, post: users' functions, or "".
        image: complete.
        sink: "parquet", "arrow", "npy" or "jsonl".
        window: slots to have in flight.
    """

    parent_pid: int
    mark_fd: int
    run_dir: str
    model: str
    kind: str
    columns: dict[str, str]
    decode: str
    post: str
    image: ImageOptions
    sink: str
    window: int


class Inbox:
    """Lines on standard input, read only when they are wanted."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._part = b""
        self._ended = False

    def take(self, *, wait: bool) -> bytes | None:
        """The next line; None if there is none yet or, having waited, at the end."""
        while not self._lines and not self._ended:
            if not wait and not select.select([self._fd], [], [], 0)[0]:
                return None
            data = os.read(self._fd, 1 << 20)
            self._ended = not data
            *lines, self._part = (self._part + data).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft() if self._lines else None


class Cell:
    """What `map` takes for an item: the row that was written into the slot, None if there was none left."""

    __slots__ = ("at", "chunk", "item")

    def __init__(self, chunk: wire.Chunk) -> None:
        self.chunk = chunk
        self.at = -1
        self.item: Item | None = None


class Producer:
    """See the module.

    Args:
        config: what to do.
        client: the connection.
        inbox: where chunks come from.
        answer_fd: where frames go.
    """

    def __init__(self, config: ProducerConfig, client: Client, inbox: Inbox, answer_fd: int) -> None:
        model = next(model for model in client.models if model.spec.name == config.model)
        self._client, self._model = client, model.spec
        self._window = config.window
        self._inbox, self._answer_fd = inbox, answer_fd
        self._reader = Reader(config.kind, config.columns)
        self._decode = make_decoder(config.decode, model.spec, config.image)
        self._post = make_post(config.post)
        self._sink = config.sink
        self._schema = schema_of(config.post) if config.sink in ("parquet", "arrow") else None
        self._mark = mmap.mmap(config.mark_fd, MARK.size)
        self._rows: Iterator[tuple[wire.Chunk, int, Item, Any]] = iter(())
        self._lost: dict[int, str] = {}
        self._open: dict[int, columns.ChunkRows] = {}
        self._spent = {"decode_ns": 0, "post_ns": 0}
        self._done: dict[int, int] = {}
        self._told_ns = time.monotonic_ns()

    def run(self) -> None:
        """Do chunks until standard input ends."""
        wire.send(self._answer_fd, wire.Ready())
        while (line := self._inbox.take(wait=True)) is not None:
            self._rows = self._all_rows(self._accept(line))
            for cell, result in self._client.map(
                self._write, self._cells(), window=self._window, ordered=False, return_exceptions=True,
                model=self._model.name,
            ):  # fmt: skip
                if cell.item is not None:
                    self._finish(cell, cell.item, result)

    # ------------------------------------------------------------------ writing

    def _accept(self, line: bytes) -> wire.Chunk:
        assign = msgspec.json.decode(line, type=wire.Assign)
        chunk = assign.chunk
        outputs = () if self._post else self._model.outputs
        self._open[chunk.number] = columns.ChunkRows(chunk.first, chunk.count, outputs)
        self._lost.update(assign.lost)
        return chunk

    def _all_rows(self, chunk: wire.Chunk) -> Iterator[tuple[wire.Chunk, int, Item, Any]]:
        """Rows of `chunk` and of those that are waiting behind it."""
        while True:
            for at, (item, value) in enumerate(self._reader.rows(chunk)):
                if item.row in self._lost:
                    self._fail(chunk, at, item.key, self._lost.pop(item.row))
                else:
                    yield chunk, at, item, value
            line = self._inbox.take(wait=False)
            if line is None:
                return
            chunk = self._accept(line)

    def _cells(self) -> Iterator[Cell]:
        """A cell for each slot; `_write` takes as many rows as it needs to fill it."""
        for chunk, at, item, value in self._rows:
            self._next: tuple[wire.Chunk, int, Item, Any] | None = (chunk, at, item, value)
            yield Cell(chunk)

    def _write(self, cell: Cell, inputs: Arrays) -> None:
        """Write the next row that can be decoded; those that cannot are error rows and take no slot."""
        row = self._next
        while row is not None:
            chunk, at, item, value = row
            start = time.monotonic_ns()
            MARK.pack_into(self._mark, 0, item.row + 1)
            try:
                item = item._replace(value=value())
                self._decode(item, inputs)
            except (ConfigError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001  # whatever a decoder raises is this row's error
                text = reason(error)
            else:
                cell.chunk, cell.at, cell.item = chunk, at, item
                return
            finally:
                MARK.pack_into(self._mark, 0, 0)
                self._spent["decode_ns"] += time.monotonic_ns() - start
            self._fail(chunk, at, item.key, text)
            row = next(self._rows, None)
        for array in inputs.values():  # a slot is there and no row is: its result is not looked at
            array[...] = 0

    # ------------------------------------------------------------------ reading

    def _finish(self, cell: Cell, item: Item, result: Result | WorkError) -> None:
        chunk, at = cell.chunk, cell.at
        if isinstance(result, WorkError):
            self._fail(chunk, at, item.key, reason(result))
            return
        values: Any = result.outputs
        if self._post is not None:
            start = time.monotonic_ns()
            MARK.pack_into(self._mark, 0, item.row + 1)
            try:
                values = self._post(item, values)
            except Exception as error:  # noqa: BLE001  # the same for what looks at results
                self._fail(chunk, at, item.key, reason(error))
                return
            finally:
                MARK.pack_into(self._mark, 0, 0)
                self._spent["post_ns"] += time.monotonic_ns() - start
        self._count(chunk, self._open[chunk.number].fill(at, item.key, values))

    def _fail(self, chunk: wire.Chunk, at: int, key: str, text: str) -> None:
        self._count(chunk, self._open[chunk.number].fail(at, key, text))

    def _count(self, chunk: wire.Chunk, full: bool) -> None:
        self._done[chunk.number] = self._done.get(chunk.number, 0) + 1
        if full:
            self._tell()
            rows = self._open.pop(chunk.number)
            wire.send(self._answer_fd, wire.Finished(chunk.number, rows.failures()), self._payload(rows))
        elif time.monotonic_ns() - self._told_ns > TELL_EVERY_NS:
            self._tell()

    def _payload(self, rows: columns.ChunkRows) -> list[bytes | memoryview]:
        start = time.monotonic_ns()
        try:
            if self._sink == "parquet":
                return columns.parquet_file(rows, self._schema)
            if self._sink == "arrow":
                return columns.arrow_batch(rows, self._schema)
            return columns.json_lines(rows) if self._sink == "jsonl" else columns.array_bytes(rows)
        finally:
            self._spent["post_ns"] += time.monotonic_ns() - start

    def _tell(self) -> None:
        for chunk, rows in self._done.items():
            wire.send(self._answer_fd, wire.Spent(chunk, rows, **self._spent))
            self._spent = {"decode_ns": 0, "post_ns": 0}
        self._done.clear()
        self._told_ns = time.monotonic_ns()


def main() -> int:
    """Run one."""
    set_up_logging("producer")
    inbox = Inbox(sys.stdin.fileno())
    config = msgspec.json.decode(inbox.take(wait=True) or b"", type=ProducerConfig)
    tie_to_parent(config.parent_pid)
    with only_answer() as answer:
        try:
            with connect(run_dir=config.run_dir) as client:
                Producer(config, client, inbox, answer.fileno()).run()
        except (TrtpoolError, MemoryError) as error:
            wire.send(answer.fileno(), wire.Fatal(type(error).__name__, str(error)))
            return 1
        except Exception as error:  # noqa: BLE001  # the parent is told, whatever it is
            _log.exception("this producer gives up")
            wire.send(answer.fileno(), wire.Fatal("PoolError", f"a producer failed: {reason(error)}"))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
