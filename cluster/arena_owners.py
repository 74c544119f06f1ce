"""One owner of the node-shared arena on every machine of the cluster, a Ray actor pinned to it.

The arena must outlive every single replica: a replica that is killed loses its leases, not the
blocks. So its owner is an actor of its own, which Ray restarts where it was; it then adopts what
lies in the arena. Failure prevented: a machine that joins later and has replicas but no owner.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.clients import RAY_NAMESPACE, raise_as_ours
from cluster.config import ClusterConfig
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.errors import KvcommonsError
from shared_cache.host.owner import ArenaOwner, OwnerIsRunningError, rules_of
from shared_cache.host.terms import StoreAdmission

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
STANDBY_S = 2.0


class OwnerActor:
    """The owner of this machine's arena of that name, in an actor's event loop.

    It begins with the actor, and so again when Ray has restarted it. Where a process outside of
    Ray owns the arena already, that one serves; this one takes over when it ends.
    """

    async def __init__(self, host: HostConfig, admission: StoreAdmission) -> None:  # type: ignore[misc]
        self._owner = ArenaOwner(host, rules_of(host, admission))
        self._takeover: asyncio.Task[None] | None = None
        try:
            await self._owner.start()
        except OwnerIsRunningError as error:
            logger.warning("%s", error)
            self._takeover = asyncio.create_task(self._wait_for_arena())

    async def ready(self) -> None:
        """Returns when clients can connect; the actor's death says that there can be no arena."""

    async def stop(self) -> None:
        """End the arena, if it is ours, and give its memory back."""
        if self._takeover is not None:
            self._takeover.cancel()
        await self._owner.stop()

    async def _wait_for_arena(self) -> None:
        while True:
            await asyncio.sleep(STANDBY_S)
            with suppress(OwnerIsRunningError):
                await self._owner.start()
                return


class ArenaOwners:
    """The owner actors of one cluster; empty when its configuration shares no arena."""

    def __init__(self, config: ClusterConfig) -> None:
        cache = config.replica_cache
        self._cache = cache if cache is not None and cache.host.scope == "node" else None
        self._prefix = f"{config.name}-arena"
        self._actors: dict[str, Any] = {}
        self._calls: dict[str, Any] = {}

    @property
    def names(self) -> set[str]:
        """The actors' names."""
        return {self._name(machine) for machine in self._actors}

    def ensure(self) -> None:
        """Start an owner on every machine that has none; forget those of machines that left."""
        if self._cache is None:
            return
        machines = {one["NodeID"] for one in ray.nodes() if one["Alive"] and _runs_actors(one)}
        for machine in machines - set(self._actors):
            actor = self._start(machine, self._cache)
            self._actors[machine], self._calls[machine] = actor, actor.ready.remote()
        for machine in set(self._actors) - machines:
            del self._actors[machine], self._calls[machine]

    def await_ready(self, timeout_s: float) -> None:
        """Wait until every owner serves; raises what starting one raised."""
        deadline_s = time.monotonic() + timeout_s
        for machine in self._calls:
            self._await(machine, max(0.0, deadline_s - time.monotonic()))

    def stop(self) -> None:
        """End all arenas and their owners."""
        calls = [actor.stop.remote() for actor in self._actors.values()]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STOP_TIMEOUT_S)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors, self._calls = {}, {}

    def _await(self, machine: str, timeout_s: float) -> None:
        try:
            ray.get(self._calls[machine], timeout=timeout_s)
        except GetTimeoutError as error:
            raise KvcommonsError(
                f"{self._name(machine)} did not get ready in time; look into its log on Ray's "
                "dashboard"
            ) from error
        except RayError as error:
            raise_as_ours(error, self._name(machine))

    def _start(self, machine: str, cache: CacheConfig) -> Any:
        actor = ray.remote(OwnerActor).options(
            name=self._name(machine),
            namespace=RAY_NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False),
        )
        return actor.remote(cache.host, cache.store_admission)

    def _name(self, machine: str) -> str:
        return f"{self._prefix}-{machine[:8]}"


def _runs_actors(machine: dict[str, Any]) -> bool:
    resources = machine["Resources"]
    return bool(resources.get("CPU") or resources.get("GPU"))
