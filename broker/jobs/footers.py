"""Parquet files that grow by row groups, and can be ended after any of them.

pyarrow writes whole files only.  So each row group is written as a small file of its own, these are appended to one
another, and in the end one footer for all of them goes behind the last.  For that, the places that a small file's
footer names are moved to where it came to stand; what lies between the row groups (small footers) is read by nobody.
Readers find row groups by the footer alone, in its order, so the order in which they were written does not matter.

A footer is a struct of Thrift's compact protocol:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md and, for the fields,
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

from typing import Final

MAGIC: Final = b"PAR1"
TAIL_BYTES: Final = 8
"""At the end of a file: the footer's length, and `MAGIC`."""

# Field ids, from FileMetaData inwards; lists add none.
_PLACES: Final = frozenset(
    {
        (4, 5),  # RowGroup.file_offset
        (4, 1, 2),  # ColumnChunk.file_offset
        (4, 1, 4),  # .offset_index_offset
        (4, 1, 6),  # .column_index_offset
        (4, 1, 3, 9),  # ColumnMetaData.data_page_offset
        (4, 1, 3, 10),  # .index_page_offset
        (4, 1, 3, 11),  # .dictionary_page_offset
        (4, 1, 3, 14),  # .bloom_filter_offset
    }
)
_BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(3, 13)


def moved(file: bytes | memoryview, by: int) -> bytes:
    """A Parquet file's end (footer, its length, magic) as it must be when the file starts at offset `by` of another.

    Args:
        file: the file, or its end with the whole footer.
        by: bytes.
    """
    length = int.from_bytes(file[-TAIL_BYTES:-4], "little")
    footer = _Mover(bytes(file[-TAIL_BYTES - length : -TAIL_BYTES]), by).run()
    return footer + len(footer).to_bytes(4, "little") + MAGIC


class _Mover:
    """Copies a struct, adding to the numbers that are places."""

    def __init__(self, data: bytes, by: int) -> None:
        self._data = data
        self._by = by
        self._at = 0
        self._copied = 0
        self._out = bytearray()

    def run(self) -> bytes:
        self._struct(())
        return bytes(self._out + self._data[self._copied :])

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def _struct(self, path: tuple[int, ...]) -> None:
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else _unzigzag(self._varint())
            if head & 15 > 2:  # 1 and 2 are a boolean, with its value
                self._value(head & 15, (*path, field))

    def _value(self, kind: int, path: tuple[int, ...]) -> None:
        if kind == _I64 and path in _PLACES:
            self._place()
        elif kind in (_I16, _I32, _I64):
            self._varint()
        elif kind == _BINARY:
            length = self._varint()
            self._at += length
        elif kind in (_LIST, _SET):
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._value(head & 15, path)
        elif kind == _STRUCT:
            self._struct(path)
        elif kind == _MAP:
            if count := self._varint():
                kinds = self._byte()
                for _ in range(count):
                    self._value(kinds >> 4, path)
                    self._value(kinds & 15, path)
        else:
            self._at += 8 if kind == _DOUBLE else 1  # a boolean in a list takes a byte

    def _place(self) -> None:
        start = self._at
        value = _unzigzag(self._varint())
        if value > 0:  # 0 stands for none
            self._out += self._data[self._copied : start] + _zigzag_varint(value + self._by)
            self._copied = self._at


def _unzigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _zigzag_varint(value: int) -> bytes:
    value, out = value << 1, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
