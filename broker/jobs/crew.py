"""The producers of a job: starting them, dealing chunks, what happens when one ends.

A producer that ends by itself is replaced, and its chunks are dealt again.  The row that it was at is to blame if that
happens there twice: it then is an error row, and nobody touches it again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple, TypeAlias

import msgspec

from trtpool.broker.modules import child_environment, start_module
from trtpool.ipc import errors
from trtpool.ipc.errors import StartFailed, TrtpoolError
from trtpool.ipc.process import describe_exit

from . import wire
from .produce import MARK, ProducerConfig

BLAMES: Final = 2
"""Producers that a row ends before it is given up."""

DEATHS: Final = 3
"""Producers that may end in a row, at no row that is to blame, before the job is given up."""

GRACE_S: Final = 10.0
"""Seconds for a producer that has nothing more to do to end."""


class Ended(NamedTuple):
    """A producer's stream is over."""


Event: TypeAlias = "tuple[Producer, wire.Ready | wire.Spent | wire.Finished | wire.Fatal | Ended, memoryview]"


class Dealer:
    """Chunks that are to be done.

    Those of one row group go to one producer while others have some of their own, since each reads a row group whole.
    """

    def __init__(self, chunks: Iterable[wire.Chunk]) -> None:
        self._groups: dict[tuple[str, int], deque[wire.Chunk]] = {}
        self._begun: set[tuple[str, int]] = set()
        self.rows = 0
        for chunk in chunks:
            self._groups.setdefault((chunk.path, chunk.group), deque()).append(chunk)
            self.rows += chunk.count

    def take(self, last: wire.Chunk | None) -> wire.Chunk | None:
        """The next chunk for a producer whose latest was `last`; None if none is left."""
        if not self._groups:
            return None
        key = (last.path, last.group) if last is not None else None
        if key not in self._groups:
            fresh = next((one for one in self._groups if one not in self._begun), None)
            key = fresh or max(self._groups, key=lambda one: len(self._groups[one]))
        assert key is not None
        self._begun.add(key)
        chunk = self._groups[key].popleft()
        self.rows -= chunk.count
        if not self._groups[key]:
            del self._groups[key]
        return chunk

    def put_back(self, chunk: wire.Chunk) -> None:
        """A chunk that was not done."""
        self._groups.setdefault((chunk.path, chunk.group), deque()).appendleft(chunk)
        self.rows += chunk.count


class Producer:
    """One process, and the thread that reads what it sends into `events`."""

    def __init__(self, config: ProducerConfig, folder: str, events: queue.Queue[Event]) -> None:
        self.mark_fd = os.memfd_create("trtpool-job-mark", os.MFD_CLOEXEC)
        os.ftruncate(self.mark_fd, MARK.size)
        self._mark = mmap.mmap(self.mark_fd, MARK.size)
        self.chunks: dict[int, wire.Chunk] = {}
        self.done: dict[int, int] = {}
        self.last: wire.Chunk | None = None
        try:
            self.process = start_module(
                "trtpool.broker.jobs.produce", child_environment(), pass_fds=[self.mark_fd], folder=folder
            )
        except BaseException:
            self._close_mark()
            raise
        self._say(msgspec.structs.replace(config, mark_fd=self.mark_fd))
        self._events = events
        self._abandoned = False
        self._thread = threading.Thread(target=self._listen, name="trtpool-job", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for header, payload in wire.frames(self.process.stdout.fileno()):
            self._tell((self, header, payload))
        self._tell((self, Ended(), memoryview(b"")))

    def _tell(self, event: Event) -> None:
        """Wait for room: a producer that is ahead of the sink is held up by its pipe."""
        while not self._abandoned:
            with contextlib.suppress(queue.Full):
                self._events.put(event, timeout=0.5)
                return

    def _say(self, message: msgspec.Struct) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended, which its stream tells
            self.process.stdin.write(msgspec.json.encode(message) + b"\n")
            self.process.stdin.flush()

    @property
    def rows_left(self) -> int:
        """Rows that it was given and has not done."""
        return sum(chunk.count - self.done.get(number, 0) for number, chunk in self.chunks.items())

    def assign(self, chunk: wire.Chunk, lost: dict[int, str]) -> None:
        """Give it a chunk."""
        self.chunks[chunk.number] = self.last = chunk
        rows = range(chunk.first, chunk.first + chunk.count)
        self._say(wire.Assign(chunk, {row: text for row, text in lost.items() if row in rows}))

    def marked_row(self) -> int | None:
        """The row that it was at when it ended."""
        (mark,) = MARK.unpack_from(self._mark)
        return mark - 1 if mark else None

    def leave(self) -> None:
        """Let it end: there is nothing more to do."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> int:
        """Kill it if it lives, and clean up; returns what `subprocess` calls its return code."""
        self._abandoned = True
        self.process.kill()
        code = self.process.wait()
        self._thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._close_mark()
        return code

    def _close_mark(self) -> None:
        self._mark.close()
        os.close(self.mark_fd)


class Crew:
    """All producers of a job; a context manager that leaves none.

    Args:
        config: theirs.
        folder: their current directory.
        count: how many.
        dealer: what is to be done.

    Attributes:
        events: what they say, in the order it came.
        replaced: how many ended and were replaced.
    """

    def __init__(self, config: ProducerConfig, folder: str, count: int, dealer: Dealer) -> None:
        self._config, self._folder, self._count = config, folder, count
        self._dealer = dealer
        self.events: queue.Queue[Event] = queue.Queue(2 * count)
        self._crew: list[Producer] = []
        self._blamed: dict[int, int] = {}
        self._lost: dict[int, str] = {}
        self._deaths = 0
        self.replaced = 0

    def __enter__(self) -> Crew:
        try:
            for _ in range(self._count):
                self._crew.append(Producer(self._config, self._folder, self.events))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for producer in self._crew:
            producer.process.kill()
        while self._crew:
            self._crew.pop().close()

    def leave(self) -> None:
        """Let all end by themselves: there is nothing more to do."""
        for producer in self._crew:
            producer.leave()
        for producer in self._crew:
            with contextlib.suppress(subprocess.TimeoutExpired):
                producer.process.wait(GRACE_S)

    @property
    def rows_in_work(self) -> int:
        """Rows that are done, of chunks that are not."""
        return sum(sum(producer.done.values()) for producer in self._crew)

    def deal(self, producer: Producer) -> None:
        """Give a producer so much that it does not wait for us, but no more than its share of what is left."""
        share = self._dealer.rows // (2 * self._count)
        while len(producer.chunks) < 2 or producer.rows_left < min(2 * self._config.window, share):
            chunk = self._dealer.take(producer.last)
            if chunk is None:
                return
            producer.assign(chunk, self._lost)

    def handle(self, producer: Producer, header: object) -> wire.Chunk | None:
        """Take note of what a producer says; returns the chunk that it has finished, if any.

        Raises:
            TrtpoolError: what the producer gave up for.
            StartFailed: producers end again and again.
        """
        if isinstance(header, wire.Spent):
            producer.done[header.chunk] = producer.done.get(header.chunk, 0) + header.rows
        elif isinstance(header, wire.Finished):
            self._deaths = 0
            producer.done.pop(header.chunk, None)
            chunk = producer.chunks.pop(header.chunk)
            self.deal(producer)
            return chunk
        elif isinstance(header, wire.Fatal):
            kind = getattr(errors, header.kind, TrtpoolError)
            raise (kind if issubclass(kind, TrtpoolError) else TrtpoolError)(header.text)
        elif isinstance(header, Ended):
            self._replace(producer)
            return None
        self.deal(producer)
        return None

    def _replace(self, producer: Producer) -> None:
        """Start another in place of one that ended."""
        self._crew.remove(producer)
        with contextlib.suppress(subprocess.TimeoutExpired):  # else it only closed the stream, and is killed
            producer.process.wait(GRACE_S)
        row = producer.marked_row()
        how = describe_exit(producer.close())
        if row is None:
            self._deaths += 1
            if self._deaths >= DEATHS:
                raise StartFailed(
                    f"producers end again and again, the last with {how}; what they said is on standard error"
                )
        else:
            self._blamed[row] = self._blamed.get(row, 0) + 1
            if self._blamed[row] >= BLAMES:
                self._lost[row] = f"it ended {BLAMES} producers: {how}"
        for chunk in producer.chunks.values():
            self._dealer.put_back(chunk)
        self.replaced += 1
        self._crew.append(Producer(self._config, self._folder, self.events))
