"""Starts, watches and stops the actors of one cluster; the place where plain classes meet Ray.

The actors are not detached: they end with the process that started them, so a driver that crashes
leaves nothing behind in a Ray that others use too.
"""

import logging
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import ray

from actors.canary import CanaryReport
from actors.config import ModelSource
from actors.dispatch import Dispatcher
from actors.metrics import Metrics
from actors.replica_health import ReplicaHealth, ReplicaStats
from actors.router_snapshot import RouterSnapshot
from cluster.arena_owners import ArenaOwners
from cluster.canaries import Canaries
from cluster.clients import RAY_NAMESPACE, connect
from cluster.config import ClusterConfig
from cluster.event_feeds import EventFeeds
from cluster.figures import Figure, canary_figures, figure, replica_figures, router_figures
from cluster.ray_metrics import Reporter
from cluster.ray_resources import await_resources
from cluster.ray_session import join_ray
from cluster.replica_actors import SNAPSHOT_TIMEOUT_S, Build, ReplicaActors, answer, await_gone
from cluster.router_actor import RouterActor
from cluster.scaler import ScalerThread
from cluster.watch import Watcher, replica_info
from shared_cache.errors import ConfigError

logger = logging.getLogger(__name__)


class Cluster:
    """A running cluster. Make one with `start`; `stop` it, or use it as a context manager."""

    def __init__(
        self, config: ClusterConfig, model: ModelSource, build: Build | None, owns_ray: bool
    ) -> None:
        self.config = config
        self.model = model
        self._owns_ray = owns_ray
        self._router: Any = None
        self._replicas = ReplicaActors(config, model, build)
        self._arenas = ArenaOwners(config)
        self._watcher: Watcher | None = None
        self._scaler: ScalerThread | None = None
        self._canaries = Canaries(self._shared_names, config.doctor.period_s or 0.0)
        self._feeds: EventFeeds | None = None
        self._reporter = Reporter(self._figures, config.lifecycle.metrics_period_s)

    @classmethod
    def start(
        cls,
        config: ClusterConfig,
        model: ModelSource | None = None,
        build: Build | None = None,
    ) -> "Cluster":
        """A cluster whose replicas are all ready, in the Ray that runs here, or else in its own.

        `model` skips resolving `config.model`; `build` replaces the engine (for tests). Raises
        `ConfigError` or `ModelError` with the fix when it cannot start; nothing is left running.
        """
        if model is None:
            from cluster.models import resolve_model

            model = resolve_model(config.model)
        cluster = cls(config, model, build, owns_ray=join_ray())
        try:
            cluster._launch()
        except BaseException:
            cluster.stop(drain_timeout_s=0)
            raise
        return cluster

    def dispatcher(self, metrics: Metrics | None = None) -> Dispatcher:
        """What sends requests to this cluster; for one event loop."""
        return connect(self.config, metrics)

    @property
    def health(self) -> dict[str, ReplicaHealth]:
        """Each replica as it was when it got ready."""
        return self._replicas.health

    @property
    def max_total_tokens(self) -> int:
        """The longest prompt plus output that every replica can serve."""
        return min(health.max_total_tokens for health in self.health.values())

    def stats(self) -> dict[str, ReplicaStats | None]:
        """A snapshot of each replica; None for one that does not answer."""
        return self._replicas.stats()

    def router(self) -> RouterSnapshot:
        """What the router believes now."""
        snapshot: RouterSnapshot = ray.get(
            self._router.snapshot.remote(), timeout=SNAPSHOT_TIMEOUT_S
        )
        return snapshot

    def is_watched(self) -> bool:
        """Whether dead replicas are still noticed."""
        return self._watcher is not None and self._watcher.is_alive()

    def canaries(self, *, again: bool = False) -> CanaryReport | None:
        """What the last round of canaries showed; None before the first one.

        `again`: begin another one.
        """
        if again:
            self._canaries.again()
        return self._canaries.report

    def reason_not_shared(self) -> str | None:
        """Why the endpoint should get no requests yet, as far as canaries tell; or None."""
        doctor, report = self.config.doctor, self._canaries.report
        is_off = doctor.period_s is None or self.config.cache is None or not doctor.required
        if is_off or self._canaries.has_passed:
            return None
        if report is None:
            return "the first round of canaries through the replicas has not ended yet"
        return "; ".join(f"{one.name}: {one.text}" for one in report.failures)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every saved block is in the shared tier; False when time ran out."""
        return self._replicas.flush(timeout_s)

    def stop(self, drain_timeout_s: float | None = None) -> None:
        """Let running requests end, write queued saves, end all actors; a second stop is a no-op.

        Waits for that at most `drain_timeout_s` (default: the configured one).
        """
        self._canaries.stop()
        if self._scaler is not None:
            self._scaler.stop()
        self._reporter.stop()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None
        if self._feeds is not None:
            self._feeds.stop()
            self._feeds = None
        if drain_timeout_s is None:
            drain_timeout_s = self.config.lifecycle.drain_timeout_s
        if ray.is_initialized():
            self._end_actors(drain_timeout_s)
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

    def _launch(self) -> None:
        cpus = await_resources(self.config)  # of all machines; a replica heeds its own's too
        threads = self.config.engine.torch_threads or max(1, int(cpus) // self.config.max_replicas)
        try:
            self._router = self._start_router()
            self._arenas.ensure()
            self._arenas.await_ready(self.config.lifecycle.startup_timeout_s)
            for name in self.config.replica_names:
                self._replicas.start(name, threads)
        except ValueError as error:  # Ray's word for a name that is taken
            raise ConfigError(
                f"{error}; another cluster of the name {self.config.name!r} runs in this Ray: "
                "stop it (`python -m cluster.cli down`), or set another `name`"
            ) from error
        self._replicas.await_ready(self.config.replica_names)
        for name in self.config.replica_names:
            self._replicas.route_to(name)
        infos = [replica_info(health) for health in self.health.values()]
        ray.get([self._router.register.remote(info) for info in infos])
        self._watcher = Watcher(
            self._router,
            lambda: self._replicas.routed,
            self.config.lifecycle,
            self._arenas.ensure,
        )
        self._watcher.tick()
        self._watcher.start()
        self._feeds = EventFeeds(
            self._router,
            lambda: self._replicas.routed,
            lambda: self._arenas.handles,
            self.config.router.events_period_s,
        )
        self._feeds.start()
        self._reporter.start()
        if self.config.cache is not None and self.config.doctor.period_s is not None:
            self._canaries.start()
        self._scaler = ScalerThread(self.config, self._replicas, threads, self._forget)
        self._scaler.start()

    def _forget(self, name: str) -> None:
        """Tell the router that a replica will not come back."""
        ray.get(self._router.unregister.remote(name), timeout=SNAPSHOT_TIMEOUT_S)

    def _start_router(self) -> Any:
        shares = self.config.cache is not None and bool(self.config.cache.all_tiers)
        kv_cache = self.config.engine.kv_cache_config
        actor = ray.remote(RouterActor).options(
            name=self.config.router_name, namespace=RAY_NAMESPACE, num_cpus=0, max_restarts=-1
        )
        return actor.remote(
            self.config.router, kv_cache.tokens_per_block, shares, kv_cache.enable_block_reuse
        )

    def _shared_names(self) -> list[str]:
        """The replicas that canaries go through."""
        return list(self._replicas.routed)

    def _figures(self) -> Iterator[Figure]:
        """What goes to the metrics now."""
        stats = self.stats()
        for name, one in stats.items():
            yield from replica_figures(name, one)
        num_ready = sum(one is not None and one.health.state == "ready" for one in stats.values())
        yield figure("replicas", num_ready, count="ready")
        yield figure("replicas", len(stats), count="wanted")
        yield figure("replicas", self.config.min_replicas, count="min")
        yield figure("replicas", self.config.max_replicas, count="max")
        call = self._router.snapshot.remote()
        ray.wait([call], timeout=SNAPSHOT_TIMEOUT_S)
        snapshot = answer(call)
        if snapshot is not None:
            yield from router_figures(snapshot)
        if self._canaries.report is not None:
            yield from canary_figures(self._canaries.report, time.time())

    def _end_actors(self, drain_timeout_s: float) -> None:
        """End all actors and wait until their names are free again."""
        names = {*self._replicas.handles, *self._arenas.names}
        self._replicas.drain(list(self._replicas.handles), drain_timeout_s)
        self._replicas.end(list(self._replicas.handles))
        if self._router is not None:
            ray.kill(self._router, no_restart=True)
            names.add(self.config.router_name)
        self._router = None
        self._arenas.stop()
        await_gone(names)
