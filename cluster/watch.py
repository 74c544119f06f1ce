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
from ray.exceptions import RayError

from actors.replica import ReplicaHealth
from cluster.config import LifecycleConfig

logger = logging.getLogger(__name__)

RESTART_PAUSE_S = 5.0
"""Time between two restarts of a replica that cannot start, so that it does not spin."""


@dataclass(frozen=True, slots=True)
class Action:
    """What to do about one replica: `boot_id` is the process that is meant."""

    verb: Literal["register", "mark_dead", "restart"]
    boot_id: str
    cache_blocks: int = 0


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
            return [*actions, Action("register", health.boot_id, health.cache_blocks)]
        actions.append(Action("mark_dead", health.boot_id))
        if health.state in ("failed", "stalled"):
            logger.warning("%s is %s: %s", health.name, health.state, health.reason)
            actions += self._restart(now_s)
        return actions

    def on_silence(self, now_s: float) -> list[Action]:
        """The replica has not answered yet."""
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

    `also` is called every period too: what else has to be kept true. `tells_changes`: engines know
    what their pools hold, and the router is told every period.

    Every period each replica is asked for its health. Registering again is a no-op for the router,
    so one that was restarted, or that was told a false alarm, knows the replicas again at once.
    """

    def __init__(
        self,
        router: Any,
        replicas: Mapping[str, Any],
        lifecycle: LifecycleConfig,
        also: Callable[[], None] = lambda: None,
        tells_changes: bool = False,
    ) -> None:
        now_s = time.monotonic()
        self._router = router
        self._replicas = replicas
        self._also = also
        self._changes = _Changes(router, replicas if tells_changes else {})
        self._period_s = lifecycle.health_period_s
        self._watches = {name: ReplicaWatch(lifecycle, now_s) for name in replicas}
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
        owing = set(self._asked.values())
        for name, handle in self._replicas.items():
            if name not in owing:
                self._asked[handle.health.remote()] = name
        answered, _ = ray.wait(
            list(self._asked), num_returns=len(self._asked), timeout=self._period_s
        )
        self._changes.tell()
        for call in answered:
            self._act(self._asked.pop(call), call)
        for name in self._asked.values():
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
        watch, now_s = self._watches[name], time.monotonic()
        try:
            health = ray.get(call)
        except RayError as error:
            logger.info("%s did not answer: %s", name, type(error).__name__)
            self._carry_out(name, watch.on_loss())
            return
        self._carry_out(name, watch.on_health(health, now_s))

    def _carry_out(self, name: str, actions: list[Action]) -> None:
        for action in actions:
            if action.verb == "register":
                self._router.register.remote(name, action.boot_id, action.cache_blocks)
                self._changes.ask(name, action.boot_id)
            elif action.verb == "mark_dead":
                self._router.mark_dead.remote(name, action.boot_id)
            else:
                logger.warning("restarting %s", name)
                ray.kill(self._replicas[name], no_restart=False)


class _Changes:
    """Carries what engines' pools got and lost to the router.

    Only what has arrived is handed on: a call of the router that waited for a replica's answer
    would hold up all later ones, among them that this replica is dead.
    """

    def __init__(self, router: Any, replicas: Mapping[str, Any]) -> None:
        self._router = router
        self._replicas = replicas
        self._asked: dict[Any, tuple[str, str]] = {}

    def ask(self, name: str, boot_id: str) -> None:
        """Ask a replica, unless it still owes an answer."""
        if name in self._replicas and all(name != asked for asked, _ in self._asked.values()):
            self._asked[self._replicas[name].cache_changes.remote()] = (name, boot_id)

    def tell(self) -> None:
        """Tell the router what has been answered; never waits."""
        if not self._asked:
            return
        calls = list(self._asked)
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in answered:
            name, boot_id = self._asked.pop(call)
            try:
                changes = ray.get(call)
            except RayError:  # it died, or its engine did not answer: the watch sees to that
                continue
            if changes:
                self._router.cache_changed.remote(name, boot_id, changes)
