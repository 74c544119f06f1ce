"""What the router believes, for routes that must answer although it does not.

A router that restarts, or hangs, must not make those wait who ask whether the endpoint is well.
"""

import asyncio

from actors.router_snapshot import RouterSnapshot
from cluster.endpoint.service import RouterView
from shared_cache.errors import ReplicaUnavailableError

SNAPSHOT_TIMEOUT_S = 3.0


async def snapshot_of(router: RouterView) -> RouterSnapshot:
    """See `RouterView.snapshot`; `ReplicaUnavailableError` also when it takes too long."""
    try:
        return await asyncio.wait_for(router.snapshot(), SNAPSHOT_TIMEOUT_S)
    except asyncio.TimeoutError as error:  # another class before Python 3.11
        text = f"the router does not answer within {SNAPSHOT_TIMEOUT_S:g} s"
        raise ReplicaUnavailableError(text) from error
