"""What runs beside the requests: statistics, cache events, and whether the engine still answers.

Nothing here may hurt a request: whatever these calls raise is counted and logged. An engine that is
stuck (upstream knows several ways, see docs/tensorrt-llm.md) still takes requests and answers none,
so one that has been idle for a while is given a token to generate.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from actors.engines.trtllm.events import PoolEvents
from actors.engines.trtllm.statistics import Statistics
from shared_cache.faults import FaultLog

logger = logging.getLogger(__name__)

BUSY_PERIOD_S, IDLE_PERIOD_S = 0.1, 1.0
HEALTH_PERIOD_S = 30.0
"""After so long without a request the engine has to generate a token."""

HEALTH_TIMEOUT_S = 60.0
"""A token that takes longer means that the engine is stuck."""


class EngineWatch:
    """Keeps one engine's figures true, and finds out when it no longer answers.

    `probe` generates a token; what it raises is kept as `failure`. For the engine's own loop.
    """

    def __init__(
        self,
        llm: Any,
        statistics: Statistics,
        events: PoolEvents | None,
        probe: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failure: Exception | None = None
        self._llm = llm
        self._statistics = statistics
        self._events = events
        self._probe = probe
        self._clock = clock
        self._busy_s = clock()
        self._faults = FaultLog(logger)

    async def run(self) -> None:
        """Watch until cancelled, or until the engine has failed."""
        while self.failure is None:
            await self.look()
            await self._check_when_idle()
            await asyncio.sleep(BUSY_PERIOD_S if self._is_busy() else IDLE_PERIOD_S)

    async def look(self) -> None:
        """Take what statistics and events there are now; never waits for more, never raises."""
        with self._faults.caught("reading TensorRT-LLM's statistics"):
            for entry in await _available(self._llm.get_stats_async):
                self._statistics.take(entry)
        if self._events is None:
            return
        with self._faults.caught("reading TensorRT-LLM's KV cache events"):
            for event in await _available(self._llm.get_kv_cache_events_async):
                self._events.take(event)

    async def check(self, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        """Generate a token; one that fails or does not come in time is the engine's end."""
        try:
            await asyncio.wait_for(self._probe(), timeout_s)
        except asyncio.TimeoutError:
            self.failure = TimeoutError(f"no token within {timeout_s:g} s, the engine is stuck")
        except Exception as error:
            self.failure = error
        if self.failure is not None:
            logger.error("the engine does not generate any more: %s", self.failure)

    def let_go(self) -> None:
        """Forget the `LLM`, which holds the pool."""
        self._llm = None

    def _is_busy(self) -> bool:
        counts = self._statistics.counts
        return counts.num_running + counts.num_waiting > 0

    async def _check_when_idle(self) -> None:
        now_s = self._clock()
        if self._is_busy():
            self._busy_s = now_s
        elif now_s - self._busy_s >= HEALTH_PERIOD_S:
            await self.check()
            self._busy_s = self._clock()


async def _available(source: Callable[..., Any]) -> list[Any]:
    """What a source has now. An empty one ends in one of several ways, by version."""
    found: list[Any] = []
    try:
        async for entry in source(timeout=0):
            found.append(entry)  # noqa: PERF401  # what came before an error counts
    except (IndexError, asyncio.QueueEmpty, asyncio.TimeoutError, TimeoutError):
        pass
    return found
