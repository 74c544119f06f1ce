"""The replica actors of one cluster: start them, wait for them, drain them, end them.

Ray's actors are placed, named and restarted by rules that must be equal for all replicas, those
of the start and those that are added under load; a replica that was started in another way would
be missed by the watcher, or hold GPUs after its end.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors import replica
from actors.config import ModelSource, ReplicaConfig
from actors.engine import Engine
from actors.replica_health import ReplicaHealth, ReplicaStats
from actors.wire.server import Address
from cluster.clients import RAY_NAMESPACE, raise_as_ours
from cluster.config import ClusterConfig
from shared_cache.errors import KvcommonsError

logger = logging.getLogger(__name__)

Build = Callable[[ReplicaConfig], Engine]

CONTROL_CALLS = 8
"""Control calls that one replica takes at a time, however many streams it has."""

SPARE_STREAMS = 64
"""Streams beyond those that a replica takes, so that it can say so to the others."""

READY_POLL_S = 1.0
SNAPSHOT_TIMEOUT_S = 10.0
CLOSE_ENGINES_TIMEOUT_S = 150.0
"""Longest wait for engines to shut down and for their GPU memory to get free."""


class EngineReplica(replica.EngineReplica):
    """A replica as an actor. Ray runs its control calls apart from the streams.

    In one group, as many streams as the group takes would keep `health` from answering, and the
    watcher would restart a replica for being busy.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        build: Callable[[ReplicaConfig], Engine] | None,
        stall_timeout_s: float,
    ) -> None:
        machine = ray.get_runtime_context().get_node_id()
        super().__init__(config, build, stall_timeout_s, machine)

    ready = ray.method(concurrency_group="control")(replica.EngineReplica.ready)
    health = ray.method(concurrency_group="control")(replica.EngineReplica.health)
    stats = ray.method(concurrency_group="control")(replica.EngineReplica.stats)
    drain = ray.method(concurrency_group="control")(replica.EngineReplica.drain)
    flush = ray.method(concurrency_group="control")(replica.EngineReplica.flush)
    close = ray.method(concurrency_group="control")(replica.EngineReplica.close)
    ask = ray.method(concurrency_group="control")(replica.EngineReplica.ask)
    cache_changes = ray.method(concurrency_group="control")(replica.EngineReplica.cache_changes)

    async def address(self) -> Address:
        """Where callers of any machine reach `generate`."""
        return await self.listen(ray.util.get_node_ip_address())


class ReplicaActors:
    """The replicas that run, by name: all (`handles`), and those that requests go to (`routed`).

    `build` replaces the engine (for tests).
    """

    def __init__(self, config: ClusterConfig, model: ModelSource, build: Build | None) -> None:
        self.handles: dict[str, Any] = {}
        self.routed: dict[str, Any] = {}
        self.health: dict[str, ReplicaHealth] = {}
        self._config = config
        self._model = model
        self._build = build

    def start(self, name: str, threads: int) -> None:
        """Start one with so many engine threads; returns at once. `ValueError`: the name is taken.

        The actor is not ready yet: `await_ready`.
        """
        config = self._config
        actor = ray.remote(concurrency_groups={"control": CONTROL_CALLS})(EngineReplica).options(
            name=name,
            namespace=RAY_NAMESPACE,
            num_cpus=config.num_cpus_per_replica,
            num_gpus=config.gpus_per_replica,
            max_restarts=-1,
            max_concurrency=config.engine.max_outstanding + SPARE_STREAMS,
            # Ray sets OMP_NUM_THREADS to num_cpus, which is for scheduling, not for speed.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        replica_config = ReplicaConfig(
            name=name,
            model=self._model,
            engine=config.engine.model_copy(update={"torch_threads": threads}),
            cache=config.replica_cache,
        )
        stall_timeout_s = config.lifecycle.stall_timeout_s
        self.handles[name] = actor.remote(replica_config, self._build, stall_timeout_s)

    def await_ready(
        self, names: Iterable[str], is_stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait for these, which load in parallel; the first failure ends the wait and is raised.

        So does `is_stopped`, which is asked now and then.
        """
        calls = {self.handles[name].ready.remote(): name for name in names}
        timeout_s = self._config.lifecycle.startup_timeout_s
        deadline_s = time.monotonic() + timeout_s
        while calls:
            left_s = deadline_s - time.monotonic()
            timeout_now_s = max(0.0, min(left_s, READY_POLL_S))
            done, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_now_s)
            if is_stopped():
                raise KvcommonsError("the cluster is being stopped")
            if not done and left_s > READY_POLL_S:
                continue
            if not done:
                raise KvcommonsError(
                    f"{', '.join(sorted(calls.values()))} did not get ready within lifecycle."
                    f"startup_timeout_s = {timeout_s:g} s; allow more time for loading the model, "
                    "or look into the logs of these actors on Ray's dashboard"
                )
            name = calls.pop(done[0])
            try:
                self.health[name] = ray.get(done[0])
            except RayError as error:
                raise_as_ours(error, name)

    def route_to(self, name: str) -> None:
        """Requests may go to this one from now on: the watcher tells the router."""
        self.routed = {**self.routed, name: self.handles[name]}

    def route_no_more_to(self, name: str) -> None:
        """The watcher looks no more after this one."""
        self.routed = {one: handle for one, handle in self.routed.items() if one != name}

    def stats(self, names: Iterable[str] | None = None) -> dict[str, ReplicaStats | None]:
        """A snapshot of each replica (of `names`); None for one that does not answer."""
        chosen = list(self.handles if names is None else names)
        calls = {one: self.handles[one].stats.remote() for one in chosen if one in self.handles}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=SNAPSHOT_TIMEOUT_S)
        return {name: answer(call) for name, call in calls.items()}

    def flush(self, timeout_s: float) -> bool:
        """Wait until every saved block is in the shared tier; False when time ran out."""
        calls = [handle.flush.remote(timeout_s) for handle in list(self.handles.values())]
        return all(ray.get(calls))

    def drain(self, names: Collection[str], timeout_s: float) -> None:
        """Let their running requests end and write their queued saves; a late one is logged."""
        if timeout_s <= 0 or not names:
            return
        calls = {self.handles[name].drain.remote(timeout_s): name for name in names}
        ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s + 5)
        for call, name in calls.items():
            if answer(call) is not True:
                logger.warning("%s was not drained within %g s", name, timeout_s)

    def end(self, names: Collection[str]) -> None:
        """End these actors, engines first; their names are free again some time later."""
        self._close_engines(names)
        for name in names:
            self.route_no_more_to(name)
            handle = self.handles.pop(name, None)
            self.health.pop(name, None)
            if handle is not None:
                ray.kill(handle, no_restart=True)

    def _close_engines(self, names: Collection[str]) -> None:
        """Let those engines end by themselves that have processes of their own: a kill misses them.

        Else their ranks would keep the GPUs' memory from whatever is started next.
        """
        if self._config.engine.kind != "trtllm":
            return
        calls = {self.handles[one].close.remote(): one for one in names if one in self.handles}
        if calls:
            ray.wait(list(calls), num_returns=len(calls), timeout=CLOSE_ENGINES_TIMEOUT_S)
        for call, name in calls.items():
            try:
                ray.get(call, timeout=0)
            except (RayError, GetTimeoutError) as error:  # noqa: PERF203  # each by itself
                logger.warning("the engine of %s did not end well: %s", name, error)


def await_gone(names: Collection[str]) -> None:
    """Wait a while until these names of actors are free again."""
    deadline_s = time.monotonic() + SNAPSHOT_TIMEOUT_S
    while set(names) & _running_names() and time.monotonic() < deadline_s:
        time.sleep(0.02)


def answer(call: Any) -> Any:
    """The result of a call if it is there; None if it failed or is not."""
    try:
        return ray.get(call, timeout=0)
    except (RayError, GetTimeoutError):
        return None


def _running_names() -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {one["name"] for one in actors if one["namespace"] == RAY_NAMESPACE}
