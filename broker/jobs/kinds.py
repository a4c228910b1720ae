"""What the names of files say of what is in them."""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

SHARD_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz")
_SUFFIXES: Final = {
    "image": frozenset(
        f".{name}"
        for name in (
            *("jpg", "jpeg", "jpe", "png", "webp", "bmp", "dib", "gif", "tif", "tiff", "jp2", "j2k"),
            *("ppm", "pgm", "pbm", "pnm", "tga", "ico", "avif"),
        )
    ),
    "parquet": frozenset((".parquet", ".pq")),
    "npy": frozenset((".npy",)),
    "arrow": frozenset((".arrow", ".arrows", ".feather", ".ipc")),
}


def kind_of(name: str) -> str:
    """The kind of a file: "image", "parquet", "npy", "arrow", "tar" or "other"."""
    name = name.lower()
    if name.endswith(SHARD_SUFFIXES):
        return "tar"
    suffix = PurePath(name).suffix
    return next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), "other")
