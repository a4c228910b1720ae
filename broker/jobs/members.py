"""Members of tar shards, read where they lie."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
from typing import Any, Final, TypeAlias

import numpy as np

from trtpool.ipc.errors import InvalidInput

from .wire import Member

PIECE: Final = 1 << 20
"""Bytes that are decompressed at once."""

ShardFile: TypeAlias = "io.FileIO | gzip.GzipFile"


def open_shard(path: str) -> ShardFile:
    """A shard as the tar file that it is; nothing is read that is not asked for."""
    if path.lower().endswith(".tar"):
        return io.FileIO(path)
    return gzip.GzipFile(path)


def advise_jumps(file: ShardFile) -> None:
    """Keep the kernel from reading on behind each header."""
    if isinstance(file, io.FileIO):
        with contextlib.suppress(OSError):  # a file system that takes no advice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


class Shard:
    """An open shard, in a producer."""

    def __init__(self, path: str) -> None:
        self._file = open_shard(path)

    def read(self, member: Member) -> bytes:
        """The bytes of a member.

        Raises:
            InvalidInput: the shard ends before it does.
            OSError, EOFError, zlib.error: it cannot be read.
        """
        data = self._piece(member) if self._whole(member) else b""
        if len(data) < member.bytes:
            raise InvalidInput("the shard is cut off within this member; write it anew")
        return data

    def _whole(self, member: Member) -> bool:
        """Whether it can be there: a damaged header may say any size, and that is not to be allocated."""
        return (
            isinstance(self._file, gzip.GzipFile) or member.at + member.bytes <= os.fstat(self._file.fileno()).st_size
        )

    def _piece(self, member: Member) -> bytes:
        if not isinstance(self._file, gzip.GzipFile):
            data = os.pread(self._file.fileno(), member.bytes, member.at)
            while 0 < len(data) < member.bytes:  # the kernel gives at most 2 GiB at once
                more = os.pread(self._file.fileno(), member.bytes - len(data), member.at + len(data))
                if not more:
                    break
                data += more
            return data
        self._file.seek(member.at)
        pieces, left = [], member.bytes
        while left and (piece := self._file.read(min(left, PIECE))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def member_value(suffix: str, data: bytes) -> Any:
    """What a function gets for a member: the array of a `.npy` file, in place; the bytes of any other.

    Raises:
        InvalidInput: it is no array.
    """
    if suffix.rpartition(".")[2].lower() != "npy":
        return data
    head = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(data, dtype, count, head.tell())
    except ValueError as error:
        raise InvalidInput(f"it is no .npy file that can be read: {error}") from error
    return flat.reshape(shape, order="F" if fortran else "C")
