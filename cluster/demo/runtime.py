"""The demo's only touch with Ray: clusters for the scenarios, one after the other.

Joins the Ray that runs on this machine when there is one, and leaves nothing running in it: every
cluster is stopped when its scenario leaves it, also after an error.
"""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import ray

from actors.config import ModelSource
from actors.replica_health import ReplicaStats
from cluster.config import ClusterConfig
from cluster.demo.asking import Asks
from cluster.driver import Cluster
from cluster.ray_session import attach_ray, join_ray
from shared_cache.errors import KvcommonsError


class RayServing:
    """A `Serving` on a running cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._dispatcher = cluster.dispatcher()

    @property
    def dispatcher(self) -> Asks:
        """See `Serving.dispatcher`."""
        return self._dispatcher

    async def stats(self) -> tuple[ReplicaStats, ...]:
        """See `Serving.stats`; raises when a replica does not answer."""
        found = await asyncio.to_thread(self._cluster.stats)
        silent = [name for name, stats in found.items() if stats is None]
        if silent:
            raise KvcommonsError(f"{', '.join(silent)} did not answer; see Ray's logs")
        return tuple(stats for stats in found.values() if stats is not None)

    async def flush(self) -> bool:
        """See `Serving.flush`."""
        timeout_s = self._cluster.config.lifecycle.drain_timeout_s
        return await asyncio.to_thread(self._cluster.flush, timeout_s)

    def kill_replica(self, name: str) -> None:
        """See `Serving.kill_replica`; refuses what is not a process of Ray on this machine."""
        pid = self._cluster.health[name].pid
        command = Path(f"/proc/{pid}/cmdline")
        if not command.exists() or not command.read_bytes().startswith(b"ray::"):
            raise KvcommonsError(
                f"{name} does not run on this machine, so --chaos cannot kill it; run the demo "
                "without --chaos, or on a Ray of one Linux machine"
            )
        os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def serve(config: ClusterConfig, model: ModelSource) -> AsyncGenerator[RayServing, None]:
    """A cluster for as long as the block runs."""
    cluster = await asyncio.to_thread(Cluster.start, config, model)
    try:
        yield RayServing(cluster)
    finally:
        await asyncio.to_thread(cluster.stop)


@contextmanager
def ray_session() -> Generator[str, None, None]:
    """Ray for as long as the block runs: the one that runs here already, else one of our own.

    Gives a sentence that says which.
    """
    if ray.is_initialized():
        yield "Using the Ray that this process is in."
        return
    is_attached = attach_ray()
    if not is_attached:
        join_ray()
    try:
        yield f"{'Joined the running' if is_attached else 'Started an own'} Ray cluster."
    finally:
        ray.shutdown()
