"""One owner of the node-shared arena on every machine of the cluster, a Ray actor pinned to it.

The arena must outlive every single replica: a replica that is killed loses its leases, not the
blocks. So its owner is an actor of its own, which Ray restarts where it was; it then adopts what
lies in the arena. Failures prevented: a machine that joins later and has replicas but no owner;
an owner that could not start once and is never tried again.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cache_changes import CacheTier, Cursor, TierChanges
from actors.cache_reports import arena_changes
from cluster.clients import RAY_NAMESPACE, raise_as_ours
from cluster.config import ClusterConfig
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.errors import KvcommonsError
from shared_cache.host.owner import ArenaOwner, OwnerIsRunningError, rules_of
from shared_cache.host.terms import StoreAdmission

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
STANDBY_S = 2.0
"""Time between two tries to own an arena."""

START_PAUSE_S = 5.0
"""Time until an actor that Ray has given up is started anew."""


class OwnerActor:
    """The owner of this machine's arena of that name, in an actor's event loop.

    It begins with the actor, and so again when Ray has restarted it. Where a process outside of
    Ray owns the arena already, that one serves; this one takes over when it ends. Where it cannot
    begin (too little memory), it goes on trying: an actor whose constructor fails is never
    restarted.
    """

    async def __init__(self, host: HostConfig, admission: StoreAdmission) -> None:  # type: ignore[misc]
        self._owner = ArenaOwner(host, rules_of(host, admission))
        self._problem: Exception | None = None
        self._starting: asyncio.Task[None] | None = None
        if not await self._has_started():
            self._starting = asyncio.create_task(self._go_on_trying())

    async def ready(self) -> None:
        """Returns when clients can connect; raises why they cannot."""
        if self._problem is not None:
            raise self._problem

    async def cache_changes(self, read: Mapping[CacheTier, Cursor]) -> tuple[TierChanges, ...]:
        """What the arena got and lost behind what was `read`, and what came to the shared tier."""
        news = self._owner.news
        return () if news is None else await arena_changes(news, read)

    async def stop(self) -> None:
        """End the arena, if it is ours, and give its memory back."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._owner.stop()

    async def _go_on_trying(self) -> None:
        while True:
            await asyncio.sleep(STANDBY_S)
            if await self._has_started():
                return

    async def _has_started(self) -> bool:
        """Try to own the arena; `_problem` is then why nobody does, if that is so."""
        before, self._problem = self._problem, None
        try:
            await self._owner.start()
        except OwnerIsRunningError as error:
            logger.info("%s; waiting for its end", error)
            return False
        except Exception as error:  # whatever it is: without an owner this machine has no arena
            self._problem = error
            if str(error) != str(before):
                logger.exception("cannot own the arena; trying again")
            return False
        return True


class ArenaOwners:
    """The owner actors of one cluster; empty when its configuration shares no arena."""

    def __init__(self, config: ClusterConfig) -> None:
        cache = config.replica_cache
        self._cache = cache if cache is not None and cache.host.scope == "node" else None
        self._prefix = f"{config.name}-arena"
        self._actors: dict[str, Any] = {}
        self._calls: dict[str, Any] = {}
        self._problems: dict[str, str] = {}
        self._start_again_s: dict[str, float] = {}

    @property
    def handles(self) -> dict[str, Any]:
        """The actors by machine."""
        return dict(self._actors)

    @property
    def names(self) -> set[str]:
        """The actors' names."""
        return {self._name(machine) for machine in self._actors}

    def ensure(self) -> None:
        """Start an owner on every machine that has none; forget those of machines that left.

        Never waits. To be called again and again: it also asks the owners whether they serve, logs
        what keeps one from it, and starts anew what Ray has given up.
        """
        if self._cache is None:
            return
        machines = {one["NodeID"] for one in ray.nodes() if one["Alive"] and _runs_actors(one)}
        for machine in set(self._actors) - machines:
            self._forget(machine)
        for machine in list(self._actors):
            self._look_at(machine)
        for machine in machines - set(self._actors):
            if time.monotonic() >= self._start_again_s.get(machine, 0.0):
                self._actors[machine] = actor = self._start(machine, self._cache)
                self._calls[machine] = actor.ready.remote()

    def await_ready(self, timeout_s: float) -> None:
        """Wait until an owner serves on every machine that can have one.

        Raises what starting one raised only if none serves: replicas on the other machines report
        for themselves that they have no arena.
        """
        calls = dict(self._calls)
        if not calls:
            return
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        errors = {machine: self._error_of(machine) for machine in calls}
        if not all(errors.values()):
            for machine in calls:
                self._look_at(machine)
            return
        machine, error = next(iter(errors.items()))
        if isinstance(error, GetTimeoutError):
            raise KvcommonsError(
                f"{self._name(machine)} did not get ready in time; look into its log on Ray's "
                "dashboard"
            ) from error
        assert error is not None
        raise_as_ours(error, self._name(machine))

    def stop(self) -> None:
        """End all arenas and their owners."""
        calls = [actor.stop.remote() for actor in self._actors.values()]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STOP_TIMEOUT_S)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        for machine in list(self._actors):
            self._forget(machine)

    def _look_at(self, machine: str) -> None:
        """Act on the answer of an owner if it is there, and ask again."""
        error = self._error_of(machine)
        if isinstance(error, GetTimeoutError):
            return
        problem = "" if error is None else str(error).strip()
        known = self._problems.get(machine, "")
        if isinstance(error, ActorDiedError) and known == problem:  # not only the call: for good
            ray.kill(self._actors[machine], no_restart=True)
            self._forget(machine)
            self._start_again_s[machine] = time.monotonic() + START_PAUSE_S
            return
        if problem != known:
            name = self._name(machine)
            if problem:
                logger.error("%s does not serve; trying again: %s", name, problem)
            else:
                logger.warning("%s serves again", name)
        self._problems[machine] = problem
        self._calls[machine] = self._actors[machine].ready.remote()

    def _error_of(self, machine: str) -> RayError | None:
        """What the last question to an owner has raised: `GetTimeoutError` if nothing yet."""
        try:
            ray.get(self._calls[machine], timeout=0)
        except RayError as error:
            return error
        return None

    def _forget(self, machine: str) -> None:
        for known in (self._actors, self._calls, self._problems):
            known.pop(machine, None)

    def _start(self, machine: str, cache: CacheConfig) -> Any:
        actor = ray.remote(OwnerActor).options(
            name=self._name(machine),
            namespace=RAY_NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False),
        )
        return actor.remote(cache.host, cache.store_admission())

    def _name(self, machine: str) -> str:
        return f"{self._prefix}-{machine[:8]}"


def _runs_actors(machine: dict[str, Any]) -> bool:
    resources = machine["Resources"]
    return bool(resources.get("CPU") or resources.get("GPU"))
