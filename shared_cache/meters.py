"""Meters: how long calls took, and how many of them shared the way, where several overlap.

Adding up the seconds of calls that ran side by side would make a store look slower than it is.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Call:
    """One metered call, complete when it has ended."""

    seconds: float = 0.0
    num_in_flight: float = 0.0


class BusyMeter:
    """Adds up the time in which at least one of several overlapping calls ran."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._busy_s = 0.0
        self.num_running = 0
        self._since_s = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds so far, calls that still run left out."""
        with self.lock:
            return self._busy_s

    @contextmanager
    def running(self) -> Iterator[Call]:
        """Count the time of the block; yields what is known of this call afterwards."""
        call, start_s = Call(), time.monotonic()
        with self.lock:
            if not self.num_running:
                self._since_s = start_s
            self.num_running += 1
            num_at_start = self.num_running
        try:
            yield call
        finally:
            now_s = time.monotonic()
            with self.lock:
                call.seconds = now_s - start_s
                call.num_in_flight = (num_at_start + self.num_running) / 2
                self.num_running -= 1
                if not self.num_running:
                    self._busy_s += now_s - self._since_s
