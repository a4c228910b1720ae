"""Arrow record batches and tables through a pool; see docs/etl.md.  Needs ``trtpool[arrow]``."""

from __future__ import annotations

from trtpool.ipc.arrow import fill, infer, map_batches, view

__all__ = ["fill", "infer", "map_batches", "view"]
