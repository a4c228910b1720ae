"""PyTorch DataLoaders over a pool; see docs/etl.md.  Needs ``trtpool[torch]``."""

from __future__ import annotations

from trtpool.ipc.collating import Collate, PendingBatch, view

__all__ = ["Collate", "PendingBatch", "view"]
