"""A pool on each node of a Ray cluster; see docs/etl.md.  Needs ``trtpool[ray]``."""

from __future__ import annotations

from trtpool.broker.ray_pools import NodePools, TrtPool

__all__ = ["NodePools", "TrtPool"]
