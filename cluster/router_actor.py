"""The router as an actor: decisions first, and what can wait in between.

Taking in what a large cache tells takes seconds of computing; done in one call it would stop all
decisions, and every ingress would choose by its own view.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from actors.cache_changes import CacheTier, Cursor, TierChanges
from actors.router import Router
from actors.router_config import RouterConfig
from actors.router_messages import Batch, ReplicaInfo, Reply
from actors.router_snapshot import RouterSnapshot

logger = logging.getLogger(__name__)

IDLE_S = 0.05


class RouterActor:
    """See `Router`, whose methods these are; all run in one event loop."""

    async def __init__(  # type: ignore[misc]
        self, config: RouterConfig, tokens_per_block: int, shares: bool, reuses: bool
    ) -> None:
        self._router = Router(config, tokens_per_block, shares, reuses)
        self._work = asyncio.create_task(self._work_off())

    async def serve(self, batch: Batch) -> Reply:
        """See `Router.serve`."""
        return self._router.serve(batch)

    async def register(self, info: ReplicaInfo) -> bool:
        """See `Router.register`."""
        return self._router.register(info)

    async def mark_dead(self, replica_id: str, boot_id: str) -> bool:
        """See `Router.mark_dead`."""
        return self._router.mark_dead(replica_id, boot_id)

    async def unregister(self, replica_id: str) -> None:
        """See `Router.unregister`."""
        self._router.unregister(replica_id)

    async def learn(self, source: str, changes: Sequence[TierChanges]) -> None:
        """See `Router.learn`."""
        for one in changes:
            self._router.learn(source, one)

    async def cursors(self, sources: Sequence[str]) -> Mapping[str, Mapping[CacheTier, Cursor]]:
        """See `Router.cursors`."""
        return self._router.cursors(sources)

    async def forget_machine(self, machine: str) -> None:
        """See `Router.forget_machine`."""
        self._router.forget_machine(machine)

    async def snapshot(self) -> RouterSnapshot:
        """See `Router.snapshot`."""
        return self._router.snapshot()

    async def _work_off(self) -> None:
        while True:
            try:
                is_done = self._router.work_off()
            except Exception:  # what is not learnt makes a guess worse, no more
                logger.exception("learning what caches tell failed; going on")
                is_done = True
            await asyncio.sleep(IDLE_S if is_done else 0)
