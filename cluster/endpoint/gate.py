"""How many requests one ingress has inside, and when to come again when it is full.  Pure.

An endpoint without a bound answers everybody late; one that says no without a time is asked again
at once by all whom it refused. So the wait that is named comes from how fast places get free, and
those who were refused before are counted as standing in front.
"""

import math
from collections import deque

from cluster.endpoint.refusals import OverloadedError

WINDOW_S = 30.0
LEAST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
UNKNOWN_WAIT_S = 5.0
"""What is named while no place has got free for `WINDOW_S`."""


class DrainRate:
    """Places that got free per second, over the last `WINDOW_S`; time is given, not read."""

    def __init__(self) -> None:
        self._freed: deque[tuple[float, int]] = deque()
        self._total = 0

    def freed(self, num_places: int, now_s: float) -> None:
        """So many places got free."""
        self._freed.append((now_s, num_places))
        self._total += num_places
        self._forget(now_s)

    def per_s(self, now_s: float) -> float:
        """Places per second; 0 while none got free."""
        self._forget(now_s)
        if not self._freed:
            return 0.0
        return self._total / max(1.0, now_s - self._freed[0][0])

    def _forget(self, now_s: float) -> None:
        while self._freed and self._freed[0][0] < now_s - WINDOW_S:
            self._total -= self._freed.popleft()[1]


class Gate:
    """The places of one ingress; a request takes one for each choice."""

    def __init__(self, num_places: int) -> None:
        self.num_inside = 0
        self._num_places = num_places
        self._rate = DrainRate()
        self._refused = 0.0
        self._refused_s = 0.0

    def enter(self, num_places: int, now_s: float) -> None:
        """Take places; raises `OverloadedError` when there are not as many."""
        if self.num_inside and self.num_inside + num_places > self._num_places:
            raise self.overloaded(num_places, now_s)
        self.num_inside += num_places

    def leave(self, num_places: int, now_s: float, was_served: bool = True) -> None:
        """Give places back; those of who was refused after all tell nothing of the rate."""
        self.num_inside -= num_places
        if was_served:
            self._rate.freed(num_places, now_s)

    def overloaded(self, num_places: int, now_s: float) -> OverloadedError:
        """The refusal for whoever wants so many places now; counts it as waiting for them."""
        wait_s = self._wait_s(num_places, now_s)
        return OverloadedError(
            f"all {self._num_places} places are taken; send the request again in {wait_s:.0f} s",
            retry_after_s=wait_s,
        )

    def _wait_s(self, num_places: int, now_s: float) -> float:
        rate = self._rate.per_s(now_s)
        self._refused = max(0.0, self._refused - rate * (now_s - self._refused_s)) + num_places
        self._refused_s = now_s
        wait_s = self._refused / rate if rate else UNKNOWN_WAIT_S
        return float(math.ceil(min(LONGEST_WAIT_S, max(LEAST_WAIT_S, wait_s))))
