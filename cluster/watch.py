"""What a watcher makes of a replica's signs of life, and the thread that acts on it.

Ray restarts a process that ends. It does not see an engine whose loop has ended or hangs in a
process that lives, nor does it tell the router that a restarted replica is another one, with an
empty cache. Both are decided here, apart from Ray, and carried out by a thread of the driver.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError

from actors.replica_health import ReplicaHealth
from actors.router_messages import ReplicaInfo
from cluster.config import LifecycleConfig

logger = logging.getLogger(__name__)

RESTART_PAUSE_S = 5.0
"""Time between two restarts of a replica that cannot start, so that it does not spin."""


@dataclass(frozen=True, slots=True)
class Action:
    """What to do about one replica: `boot_id` is the process that is meant."""

    verb: Literal["register", "mark_dead", "restart"]
    boot_id: str
    info: ReplicaInfo | None = None


class ReplicaWatch:
    """Signs of life of one replica in, actions out; time is given, not read."""

    def __init__(self, lifecycle: LifecycleConfig, now_s: float) -> None:
        self._lifecycle = lifecycle
        self._boot_id = ""
        self._heard_s = now_s
        self._restarted_s = float("-inf")

    def on_health(self, health: ReplicaHealth, now_s: float) -> list[Action]:
        """The replica has answered."""
        actions = []
        if self._boot_id not in ("", health.boot_id):
            actions.append(Action("mark_dead", self._boot_id))
        self._boot_id, self._heard_s = health.boot_id, now_s
        if health.state == "ready":
            return [*actions, Action("register", health.boot_id, replica_info(health))]
        actions.append(Action("mark_dead", health.boot_id))
        if health.state in ("failed", "stalled"):
            logger.warning("%s is %s: %s", health.name, health.state, health.reason)
            actions += self._restart(now_s)
        return actions

    def on_silence(self, now_s: float) -> list[Action]:
        """The replica has not answered yet, or with an error only."""
        silent_s = now_s - self._heard_s
        if silent_s >= self._lifecycle.restart_timeout_s:
            return [Action("mark_dead", self._boot_id), *self._restart(now_s)]
        if silent_s >= self._lifecycle.silence_timeout_s:
            return [Action("mark_dead", self._boot_id)]
        return []

    def on_loss(self) -> list[Action]:
        """Ray says that the process is gone; it restarts it by itself."""
        return [Action("mark_dead", self._boot_id)]

    def _restart(self, now_s: float) -> list[Action]:
        if now_s - self._restarted_s < RESTART_PAUSE_S:
            return []
        self._restarted_s = self._heard_s = now_s
        return [Action("restart", self._boot_id)]


class Watcher:
    """A thread that keeps the router's list of replicas true; `stop` ends it.

    `replicas` gives those that are to be routed to, which may change.
    `also` is called every period too: what else has to be kept true.

    Every period each replica is asked for its health. Registering again is a no-op for the router,
    so one that was restarted, or that was told a false alarm, knows the replicas again at once.
    """

    def __init__(
        self,
        router: Any,
        replicas: Callable[[], Mapping[str, Any]],
        lifecycle: LifecycleConfig,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self._router = router
        self._replicas = replicas
        self._also = also
        self._period_s = lifecycle.health_period_s
        self._lifecycle = lifecycle
        self._watches: dict[str, ReplicaWatch] = {}
        self._asked: dict[Any, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcommons-watcher", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns when nothing more will be done."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_alive(self) -> bool:
        """Whether it still watches."""
        return self._thread.is_alive()

    def tick(self) -> None:
        """Ask every replica that owes no answer, wait one period, act on what is known."""
        owing, replicas = set(self._asked.values()), self._replicas()
        self._watches = {
            name: self._watches.get(name) or ReplicaWatch(self._lifecycle, time.monotonic())
            for name in replicas
        }
        for name, handle in replicas.items():
            if name not in owing:
                self._asked[handle.health.remote()] = name
        answered, _ = ray.wait(
            list(self._asked), num_returns=len(self._asked), timeout=self._period_s
        )
        for call in answered:
            self._act(self._asked.pop(call), call)
        for name in self._asked.values():
            if name in self._watches:
                self._carry_out(name, self._watches[name].on_silence(time.monotonic()))

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try(self.tick, "watching the replicas")
            self._try(self._also, "looking after what belongs to the replicas")
            self._stop.wait(self._period_s)

    def _try(self, work: Callable[[], None], what: str) -> None:
        """Do it, and go on whatever it raises: else nobody would notice a dead replica."""
        try:
            work()
        except Exception:
            logger.exception("%s failed; trying again", what)

    def _act(self, name: str, call: Any) -> None:
        watch, now_s = self._watches.get(name), time.monotonic()
        if watch is None or name not in self._replicas():  # it was removed meanwhile
            return
        try:
            health = ray.get(call)
        except RayActorError as error:
            logger.info("%s did not answer: %s", name, type(error).__name__)
            self._carry_out(name, watch.on_loss())
            return
        except RayError as error:  # its process lives, so Ray will not restart it
            logger.warning("%s cannot tell its health: %s", name, error)
            self._carry_out(name, watch.on_silence(now_s))
            return
        self._carry_out(name, watch.on_health(health, now_s))

    def _carry_out(self, name: str, actions: list[Action]) -> None:
        for action in actions:
            if action.verb == "register":
                self._router.register.remote(action.info)
            elif action.verb == "mark_dead":
                self._router.mark_dead.remote(name, action.boot_id)
            else:
                logger.warning("restarting %s", name)
                handle = self._replicas().get(name)
                if handle is not None:
                    ray.kill(handle, no_restart=False)


def replica_info(health: ReplicaHealth) -> ReplicaInfo:
    """What the router has to know of a replica that is ready."""
    return ReplicaInfo(health.name, health.boot_id, health.machine, health.device_tokens)
