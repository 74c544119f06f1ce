"""Canaries through the replicas of a running cluster: at start, on a timer, and when asked.

See `actors.canary` for what they show. They run in a thread of the driver with an event loop of its
own, one round at a time; a round that fails as a whole must not be the last one.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from actors.canary import CanaryReport, try_pairs
from actors.questions import AskedReplica
from cluster.clients import RayReplica

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 15.0


def asked_replicas(names: Sequence[str]) -> list[AskedReplica]:
    """The replica actors of these names, to be asked from one event loop."""
    return [AskedReplica(name, RayReplica(name)) for name in names]


async def try_cluster(names: Sequence[str]) -> CanaryReport:
    """What canaries through the replica actors of these names show."""
    return await try_pairs(asked_replicas(names))


class Canaries:
    """A thread that sends canaries through the replicas that `names` gives; `stop` ends it."""

    def __init__(self, names: Callable[[], Sequence[str]], period_s: float) -> None:
        self._names = names
        self._period_s = period_s
        self._report: CanaryReport | None = None
        self._has_passed = False
        self._wake = threading.Event()
        self._is_stopped = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[CanaryReport]] | None = None
        self._thread = threading.Thread(target=self._run, name="kvcommons-canaries", daemon=True)

    @property
    def report(self) -> CanaryReport | None:
        """What the last round showed; None before the end of the first one."""
        return self._report

    @property
    def has_passed(self) -> bool:
        """Whether a round has ended without a failure since the start."""
        return self._has_passed

    def start(self) -> None:
        """Begin with a round now."""
        self._thread.start()

    def again(self) -> None:
        """Begin the next round now, or after the one that is running."""
        self._wake.set()

    def stop(self) -> None:
        """End the round that is running; returns when it has removed what it had stored."""
        self._is_stopped = True
        self._wake.set()
        running = self._running
        if running is not None:
            loop, task = running
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_stopped:
            self._wake.clear()
            try:
                self._note(asyncio.run(self._round()))
            except asyncio.CancelledError:  # by `stop`
                return
            except Exception:
                logger.exception("a round of canaries failed; the next one is tried all the same")
            self._wake.wait(self._period_s if self._has_passed else min(10.0, self._period_s))

    async def _round(self) -> CanaryReport:
        task = asyncio.ensure_future(try_cluster(self._names()))
        self._running = asyncio.get_running_loop(), task
        if self._is_stopped:
            task.cancel()
        try:
            return await task
        finally:
            self._running = None

    def _note(self, report: CanaryReport) -> None:
        before = set(self._report.failures) if self._report else set()
        for one in report.failures:
            if one not in before and not self._is_stopped:
                logger.warning("canary %s: %s", one.name, one.text)
        self._report = report
        self._has_passed = self._has_passed or not report.failures
