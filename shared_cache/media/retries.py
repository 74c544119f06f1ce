"""Trying again: a few times, with pauses that grow and differ, and never beyond a deadline.

A busy object store answers 503, a network loses a connection, and the next try is served. Failure
prevented: a miss for want of a second try, and its opposites: replicas that all come back at the
same moment, and a dead store that is asked until a request's own deadline has passed. Only for
operations that may be done twice; what the store refuses (permission, no such bucket, full) is not
tried again. A store that stays away is the business of `faults.StoreGuard`.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from shared_cache.media.io_errors import may_pass

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often something is tried, and how long the pauses between the tries are."""

    max_tries: int = 4
    first_pause_s: float = 0.1
    longest_pause_s: float = 2.0

    def pause_s(self, num_tries: int, chance: float) -> float:
        """The pause after `num_tries` tries: it doubles, up to a limit.

        `chance`, from 0 to 1, picks between half of that and all of it.
        """
        whole_s = min(self.first_pause_s * 2.0 ** (num_tries - 1), self.longest_pause_s)
        return whole_s * (1 + chance) / 2


DEFAULT_POLICY = RetryPolicy()
DEFAULT_TIMEOUT_S = 30.0


class Retries:
    """Runs the operations of one medium again when an error may pass; thread-safe."""

    def __init__(
        self,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        policy: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._timeout_s = timeout_s
        self._policy = policy or DEFAULT_POLICY
        self._clock = clock
        self._sleep = sleep
        self._chance = chance
        self._lock = threading.Lock()
        self._num_retries = 0

    @property
    def num_retries(self) -> int:
        """How many tries were made that were not the first."""
        return self._num_retries

    def run(self, operation: Callable[[float], T]) -> T:
        """What `operation` returns in one of its tries; else its last error is raised.

        It is given the seconds that are left to it. One that overruns them is not interrupted here,
        but not tried again either.
        """
        deadline_s = self._clock() + self._timeout_s
        for num_tries in count(1):
            try:
                return operation(deadline_s - self._clock())
            except Exception as error:
                pause_s = self._policy.pause_s(num_tries, self._chance())
                too_late = self._clock() + pause_s >= deadline_s
                if too_late or num_tries >= self._policy.max_tries or not may_pass(error):
                    raise
            with self._lock:
                self._num_retries += 1
            self._sleep(pause_s)
        raise AssertionError("unreachable")
