"""Starts, watches and stops the actors of one cluster; the place where plain classes meet Ray.

The actors are not detached: they end with the process that started them, so a driver that crashes
leaves nothing behind in a Ray that others use too.
"""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors import replica
from actors.config import ModelSource, ReplicaConfig
from actors.dispatch import Dispatcher
from actors.engine import Engine
from actors.metrics import Metrics
from actors.replica import ReplicaHealth, ReplicaStats
from actors.router import Router, RouterSnapshot
from cluster.arena_owners import ArenaOwners
from cluster.clients import RAY_NAMESPACE, connect, raise_as_ours
from cluster.config import ClusterConfig
from cluster.ray_resources import await_resources
from cluster.ray_session import join_ray
from cluster.watch import Watcher
from shared_cache.errors import ConfigError, KvcommonsError

logger = logging.getLogger(__name__)

CONTROL_CALLS = 8
"""Control calls that one replica takes at a time, however many streams it has."""

SPARE_STREAMS = 64
"""Streams beyond those that a replica takes, so that it can say so to the others."""

SNAPSHOT_TIMEOUT_S = 10.0
CLOSE_ENGINES_TIMEOUT_S = 150.0
"""Longest wait for engines to shut down and for their GPU memory to get free."""


class EngineReplica(replica.EngineReplica):
    """A replica as an actor. Ray runs its control calls apart from the streams.

    In one group, as many streams as the group takes would keep `health` from answering, and the
    watcher would restart a replica for being busy.
    """

    ready = ray.method(concurrency_group="control")(replica.EngineReplica.ready)
    health = ray.method(concurrency_group="control")(replica.EngineReplica.health)
    stats = ray.method(concurrency_group="control")(replica.EngineReplica.stats)
    drain = ray.method(concurrency_group="control")(replica.EngineReplica.drain)
    flush = ray.method(concurrency_group="control")(replica.EngineReplica.flush)
    close = ray.method(concurrency_group="control")(replica.EngineReplica.close)
    cache_changes = ray.method(concurrency_group="control")(replica.EngineReplica.cache_changes)


class Cluster:
    """A running cluster. Make one with `start`; `stop` it, or use it as a context manager."""

    def __init__(self, config: ClusterConfig, model: ModelSource, owns_ray: bool) -> None:
        self.config = config
        self.model = model
        self.health: dict[str, ReplicaHealth] = {}
        self._owns_ray = owns_ray
        self._router: Any = None
        self._replicas: dict[str, Any] = {}
        self._arenas = ArenaOwners(config)
        self._watcher: Watcher | None = None

    @classmethod
    def start(
        cls,
        config: ClusterConfig,
        model: ModelSource | None = None,
        build: Callable[[ReplicaConfig], Engine] | None = None,
    ) -> "Cluster":
        """A cluster whose replicas are all ready, in the Ray that runs here, or else in its own.

        `model` skips resolving `config.model`; `build` replaces the engine (for tests). Raises
        `ConfigError` or `ModelError` with the fix when it cannot start; nothing is left running.
        """
        if model is None:
            from cluster.models import resolve_model

            model = resolve_model(config.model)
        cluster = cls(config, model, owns_ray=join_ray())
        try:
            cluster._launch(build)
        except BaseException:
            cluster.stop(drain_timeout_s=0)
            raise
        return cluster

    def dispatcher(self, metrics: Metrics | None = None) -> Dispatcher:
        """What sends requests to this cluster; for one event loop."""
        return connect(self.config, metrics)

    @property
    def max_total_tokens(self) -> int:
        """The longest prompt plus output that every replica can serve."""
        return min(health.max_total_tokens for health in self.health.values())

    def stats(self) -> dict[str, ReplicaStats | None]:
        """A snapshot of each replica; None for one that does not answer."""
        calls = {name: handle.stats.remote() for name, handle in self._replicas.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=SNAPSHOT_TIMEOUT_S)
        return {name: _answer(call) for name, call in calls.items()}

    def router(self) -> RouterSnapshot:
        """What the router believes now."""
        snapshot: RouterSnapshot = ray.get(
            self._router.snapshot.remote(), timeout=SNAPSHOT_TIMEOUT_S
        )
        return snapshot

    def is_watched(self) -> bool:
        """Whether dead replicas are still noticed."""
        return self._watcher is not None and self._watcher.is_alive()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every saved block is in the shared tier; False when time ran out."""
        calls = [handle.flush.remote(timeout_s) for handle in self._replicas.values()]
        return all(ray.get(calls))

    def stop(self, drain_timeout_s: float | None = None) -> None:
        """Let running requests end, write queued saves, end all actors; a second stop is a no-op.

        Waits for that at most `drain_timeout_s` (default: the configured one).
        """
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None
        if drain_timeout_s is None:
            drain_timeout_s = self.config.lifecycle.drain_timeout_s
        if ray.is_initialized():
            self._drain(drain_timeout_s)
            self._close_engines()
            self._kill()
            if self._owns_ray:
                ray.shutdown()
        self._owns_ray = False

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _launch(self, build: Callable[[ReplicaConfig], Engine] | None) -> None:
        cpus = await_resources(self.config)  # of all machines; a replica heeds its own's too
        threads = self.config.engine.torch_threads or max(1, int(cpus) // self.config.replicas)
        try:
            self._router = self._start_router()
            self._arenas.ensure()
            self._arenas.await_ready(self.config.lifecycle.startup_timeout_s)
            for name in self.config.replica_names:
                self._replicas[name] = self._start_replica(name, threads, build)
        except ValueError as error:  # Ray's word for a name that is taken
            raise ConfigError(
                f"{error}; another cluster of the name {self.config.name!r} runs in this Ray: "
                "stop it (`python -m cluster.cli down`), or set another `name`"
            ) from error
        self._await_ready()
        self._watcher = Watcher(
            self._router,
            self._replicas,
            self.config.lifecycle,
            self._arenas.ensure,
            tells_changes=self.config.engine.kind == "trtllm",
        )
        self._watcher.tick()
        self._watcher.start()

    def _start_router(self) -> Any:
        shares = self.config.cache is not None and bool(self.config.cache.all_tiers)
        actor = ray.remote(Router).options(
            name=self.config.router_name, namespace=RAY_NAMESPACE, num_cpus=0, max_restarts=-1
        )
        return actor.remote(
            self.config.router, self.config.engine.kv_cache_config.tokens_per_block, shares
        )

    def _start_replica(
        self, name: str, threads: int, build: Callable[[ReplicaConfig], Engine] | None
    ) -> Any:
        config = self.config
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
            model=self.model,
            engine=config.engine.model_copy(update={"torch_threads": threads}),
            cache=config.replica_cache,
        )
        return actor.remote(replica_config, build, config.lifecycle.stall_timeout_s)

    def _await_ready(self) -> None:
        """Wait for all replicas, which load in parallel; the first failure ends the wait."""
        calls = {handle.ready.remote(): name for name, handle in self._replicas.items()}
        deadline_s = time.monotonic() + self.config.lifecycle.startup_timeout_s
        while calls:
            left_s = deadline_s - time.monotonic()
            done, _ = ray.wait(list(calls), num_returns=1, timeout=max(0.0, left_s))
            if not done:
                raise KvcommonsError(self._late(sorted(calls.values())))
            name = calls.pop(done[0])
            try:
                self.health[name] = ray.get(done[0])
            except RayError as error:
                raise_as_ours(error, name)

    def _late(self, names: list[str]) -> str:
        return (
            f"{', '.join(names)} did not get ready within lifecycle.startup_timeout_s = "
            f"{self.config.lifecycle.startup_timeout_s:g} s; allow more time for loading the "
            "model, or look into the logs of these actors on Ray's dashboard"
        )

    def _drain(self, timeout_s: float) -> None:
        if timeout_s <= 0 or not self._replicas:
            return
        calls = {handle.drain.remote(timeout_s): name for name, handle in self._replicas.items()}
        ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s + 5)
        for call, name in calls.items():
            if _answer(call) is not True:
                logger.warning("%s was not drained within %g s", name, timeout_s)

    def _close_engines(self) -> None:
        """Let those engines end by themselves that have processes of their own: a kill misses them.

        Else their ranks would keep the GPUs' memory from whatever is started next.
        """
        if self.config.engine.kind != "trtllm":
            return
        calls = {handle.close.remote(): name for name, handle in self._replicas.items()}
        if calls:
            ray.wait(list(calls), num_returns=len(calls), timeout=CLOSE_ENGINES_TIMEOUT_S)
        for call, name in calls.items():
            try:
                ray.get(call, timeout=0)
            except (RayError, GetTimeoutError) as error:  # noqa: PERF203  # each by itself
                logger.warning("the engine of %s did not end well: %s", name, error)

    def _kill(self) -> None:
        """End all actors and wait until their names are free again."""
        names = {*self._replicas, *self._arenas.names}
        for handle in (*self._replicas.values(), self._router):
            if handle is not None:
                ray.kill(handle, no_restart=True)
        if self._router is not None:
            names.add(self.config.router_name)
        self._arenas.stop()
        deadline_s = time.monotonic() + SNAPSHOT_TIMEOUT_S
        while names.intersection(_running_names()) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        self._replicas, self._router = {}, None


def _running_names() -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {one["name"] for one in actors if one["namespace"] == RAY_NAMESPACE}


def _answer(call: Any) -> Any:
    """The result of a call if it is there; None if it failed or is not."""
    try:
        return ray.get(call, timeout=0)
    except (RayError, GetTimeoutError):
        return None
