"""Who takes part."""

from __future__ import annotations

from typing import Final

from . import iceoryx, litserve_peer, local, mosec_peer, own, ray_actors, ray_data, torch_queue, triton
from .contestant import Contestant

CONTESTANTS: Final[dict[str, type[Contestant]]] = {
    one.name: one
    for one in (
        own.Runs,
        own.ShortRuns,
        own.Slots64,
        own.Spinning,
        local.Ring,
        local.ChunkedRing,
        iceoryx.Iceoryx,
        iceoryx.SharedService,
        torch_queue.TorchQueue,
        local.Queue,
        local.Executor,
        mosec_peer.Mosec,
        triton.Triton,
        litserve_peer.LitServe,
        ray_actors.RayActors,
        ray_data.RayData,
        ray_data.RayDataBulk,
    )
}
"""By name, in the order of the table.  Their modules import a peer's package only when it starts."""
