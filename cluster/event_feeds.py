"""Carries what caches tell from replicas and arena owners to the router.

The router says how far it has read each of them, and each tells what comes behind that. So a lost
message, a restarted router and a restarted replica need nothing special: the next round repairs
it. A source that does not answer holds up nobody: it is asked again when it has.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

ROUTER_TIMEOUT_S = 5.0

Sources = Callable[[], Mapping[str, Any]]
"""Actors that have `cache_changes`, by the name that the router knows them by."""


class EventFeeds:
    """A thread that asks all sources once a period; `stop` ends it."""

    def __init__(self, router: Any, replicas: Sources, machines: Sources, period_s: float) -> None:
        self._router = router
        self._replicas = replicas
        self._machines = machines
        self._period_s = period_s
        self._asked: dict[Any, str] = {}
        self._known_machines: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcommons-feeds", daemon=True)

    def start(self) -> None:
        """Begin to feed the router."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; returns when nothing more will be told."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def tick(self) -> None:
        """Ask all that owe no answer, and hand on what has been answered within a period."""
        machines = self._machines()
        for gone in self._known_machines - set(machines):
            self._router.forget_machine.remote(gone)
        self._known_machines = set(machines)
        self._ask({**self._replicas(), **machines})
        if self._asked:
            calls = list(self._asked)
            answered, _ = ray.wait(calls, num_returns=len(calls), timeout=self._period_s)
            for call in answered:
                self._hand_on(self._asked.pop(call), call)

    def _ask(self, sources: Mapping[str, Any]) -> None:
        owing = set(self._asked.values())
        names = tuple(one for one in sources if one not in owing)
        try:
            read = ray.get(self._router.cursors.remote(names), timeout=ROUTER_TIMEOUT_S)
        except RayError:  # it restarts, or is late
            return
        for name in names:
            self._asked[sources[name].cache_changes.remote(read[name])] = name

    def _hand_on(self, source: str, call: Any) -> None:
        try:
            changes = ray.get(call)
        except RayError:  # it died, or its engine did not answer: the watch sees to that
            return
        if changes:
            self._router.learn.remote(source, changes)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.tick()
            except Exception:
                logger.exception("telling the router what caches hold failed; trying again")
            self._stop.wait(self._period_s)
