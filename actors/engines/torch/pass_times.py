"""How long passes take on the device, without the host waiting for them.

The cost gate compares loading with computing, so it has to know what computing costs: the pass
itself, from when the device can begin with it, whatever the host does meanwhile.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from actors.engines.torch.scheduled import Scheduled

Items = tuple[Scheduled, ...]


class PassTimes:
    """Times one pass after the other on one stream; on a CPU by the clock, as nothing is queued."""

    def __init__(self, *, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._running: deque[tuple[Items, Any, Any]] = deque()

    def now(self) -> Any:
        """A mark behind everything that was put on the current stream so far."""
        if not self._is_cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()
        return mark

    def note(self, items: Items, start: Any) -> None:
        """A pass over `items`, which began at `start`, has been put on the stream."""
        self._running.append((items, start, self.now()))

    def take_done(self) -> Iterator[tuple[Items, float]]:
        """The passes that have ended, each once, with their seconds."""
        while self._running and self._has_ended(self._running[0][2]):
            items, start, end = self._running.popleft()
            yield items, start.elapsed_time(end) / 1000 if self._is_cuda else end - start

    def _has_ended(self, mark: Any) -> bool:
        return not self._is_cuda or bool(mark.query())
