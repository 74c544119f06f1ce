"""Adds replicas to a running cluster and removes them, as `scaling` decides, in a thread.

A new replica gets the prefixes that the others were asked for most before the router hears of it:
else its first requests would all wait. One that goes takes no more requests, finishes what it runs,
and writes what nobody else has: what it computed is not lost with it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from actors.hottest import hottest
from actors.questions import AskedReplica
from actors.replica_health import ReplicaStats
from cluster.canaries import asked_replicas
from cluster.config import ClusterConfig
from cluster.replica_actors import ReplicaActors
from cluster.scaling import Awaited, ReplicaLoad, Scaler, ScalingRules
from shared_cache.errors import KvcommonsError

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
CALL_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 60.0
ERRORS = (KvcommonsError, RayError, ValueError, TimeoutError, asyncio.TimeoutError)
"""What starting, asking and ending a replica may raise."""


class ScalerThread:
    """Looks at the load once a period and changes the number of replicas; `stop` ends it.

    `forget` tells the router that a replica will not come back.
    """

    def __init__(
        self,
        config: ClusterConfig,
        replicas: ReplicaActors,
        num_threads: int,
        forget: Callable[[str], Any],
    ) -> None:
        self._config = config
        self._replicas = replicas
        self._num_threads = num_threads
        self._forget = forget
        self._scaler = Scaler(rules_of(config), time.monotonic())
        self._awaited = Awaited(config.lifecycle.startup_timeout_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcommons-scaler", daemon=True)

    def start(self) -> None:
        """Begin to scale, if the number may change."""
        if self._config.min_replicas < self._config.max_replicas:
            self._thread.start()

    def stop(self) -> None:
        """Change nothing more; returns when a change that is under way has ended.

        A replica that is starting is left to whoever ends all of them.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def tick(self) -> None:
        """Look at the load, and do what it takes; waits until a change is complete."""
        stats = self._replicas.stats(self._replicas.routed)
        states = {name: None if one is None else one.health.state for name, one in stats.items()}
        loads = [self._load(name, one) for name, one in stats.items() if one and _is_ready(one)]
        now_s = time.monotonic()
        num_pending = self._awaited.count(states, now_s)
        num_broken = len(stats) - len(loads) - num_pending
        decision = self._scaler.decide(loads, num_pending, now_s, num_broken)
        if decision.verb == "add":
            self.add()
        elif decision.verb == "remove":
            self.remove(decision.replica)

    def add(self) -> str | None:
        """Start, warm and route to one more replica; its name, None if it did not start."""
        name = self._free_name()
        logger.warning("load is high: starting %s", name)
        try:
            self._replicas.start(name, self._num_threads)
            self._replicas.await_ready([name], self._stop.is_set)
        except ERRORS as error:
            if not self._stop.is_set():
                logger.error("%s did not start: %s", name, error)
                self._replicas.end([name])
            self._scaler.failed(time.monotonic())
            return None
        num_blocks = self._warm(name)
        self._replicas.route_to(name)
        logger.warning("%s serves from now on, with %d blocks at hand", name, num_blocks)
        return name

    def remove(self, name: str) -> None:
        """Route no more to a replica, let it finish and save, end it."""
        logger.warning("load is low: removing %s", name)
        # It takes no requests from here on, and the watcher, who sees that, tells the router.
        self._replicas.drain([name], self._config.lifecycle.drain_timeout_s)
        self._replicas.route_no_more_to(name)
        try:
            self._forget(name)
        except ERRORS as error:  # a router that restarts has forgotten it by itself
            logger.warning("the router could not be told that %s goes: %s", name, error)
        finally:  # nobody looks after it any more: it would hold its GPU and its name
            self._replicas.end([name])

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self.tick()
            except Exception:  # noqa: PERF203  # each period by itself
                if not self._stop.is_set():
                    logger.exception("scaling failed; trying again")

    def _load(self, name: str, stats: ReplicaStats) -> ReplicaLoad:
        return ReplicaLoad(name, stats.num_outstanding, self._config.engine.max_batch_size)

    def _free_name(self) -> str:
        return next(
            name
            for name in map(self._config.replica_name, range(self._config.max_replicas + 1))
            if name not in self._replicas.handles
        )

    def _warm(self, name: str) -> int:
        """Bring what the others were asked for most into the new one's reach; how many blocks."""
        others = [one for one in self._replicas.routed if one != name]
        try:
            return asyncio.run(warm(name, others, self._config.scaling.warm_timeout_s))
        except ERRORS as error:
            logger.warning("%s could not be warmed: %s", name, error)
            return 0


def _is_ready(stats: ReplicaStats) -> bool:
    return stats.health.state == "ready"


def rules_of(config: ClusterConfig) -> ScalingRules:
    """The rules that the settings describe."""
    scaling = config.scaling
    return ScalingRules(
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        high=scaling.high_load,
        low=scaling.low_load,
        up_after_s=scaling.up_after_s,
        down_after_s=scaling.down_after_s,
        pause_s=scaling.pause_s,
    )


async def warm(name: str, others: list[str], timeout_s: float) -> int:
    """Have the replica stage what the others were asked for most; how many blocks it has then."""
    (new,) = asked_replicas([name])
    deadline_s = time.monotonic() + timeout_s
    room = await asyncio.wait_for(new.num_warm_blocks(), CALL_TIMEOUT_S)
    asked = [_recent(one, room) for one in asked_replicas(others)]
    traces = [trace for some in await asyncio.gather(*asked) for trace in some]
    left_s = max(0.0, deadline_s - time.monotonic())
    return await asyncio.wait_for(new.warm(hottest(traces, room), left_s), left_s + CALL_TIMEOUT_S)


async def _recent(one: AskedReplica, max_blocks: int) -> Any:
    try:
        return await asyncio.wait_for(one.recent(max_blocks), CALL_TIMEOUT_S)
    except (KvcommonsError, asyncio.TimeoutError):
        return ()
