"""What all sinks are: files that grow by chunks, and say in what order these belong when the last is there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from .journal import Entry
from .wire import Chunk

DATA: Final = "data"

Moves = list[tuple[str, str]]


class Sink:
    """A file, or some, that grow by chunks.

    Args:
        folder: where to write.
        output: what it is to become.
        safe: chunks that are there.
    """

    def __init__(self, folder: Path, output: Path, safe: Iterable[Entry]) -> None:
        self._folder = folder
        self._output = output
        self._fd = os.open(folder / DATA, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.bytes = max((entry.offset + entry.bytes for entry in safe), default=0)
        os.ftruncate(self._fd, self.bytes)

    def append(self, chunk: Chunk, payload: memoryview, errors: tuple[tuple[int, str, str], ...]) -> list[Entry]:
        """Write a chunk; returns entries for the journal, of this chunk or of others that waited for it."""
        return [self._put(chunk, payload, errors)]

    def _put(self, chunk: Chunk, payload: memoryview | bytes, errors: tuple[tuple[int, str, str], ...]) -> Entry:
        start = self.bytes
        write_at(self._fd, payload, start)
        self.bytes += len(payload)
        return Entry(chunk.number, start, len(payload), errors)

    def sync(self) -> None:
        """Wait until all is on disk."""
        os.fdatasync(self._fd)

    def held(self) -> list[Entry]:
        """Chunks that waited for something that will not come: written now."""
        return []

    def finish(self, entries: Sequence[Entry]) -> Moves:
        """Complete the file, with its chunks in the order of `entries`; returns what to move where."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the files."""
        os.close(self._fd)


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at an offset."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest, offset = rest[done:], offset + done
