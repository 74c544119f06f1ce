"""How large a store is by now, as far as can be told without listing it.

Listing a large store takes seconds, and an object store bills it; a store that is never listed
overruns its budget.
"""

import threading

RELIST_ROUNDS = 10
"""A store is listed again after so many rounds, however little this process has written."""


class SizeEstimate:
    """How large a store is by now, as far as can be told without listing it; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listed_bytes: int | None = None
        self._is_trusted = True
        self._written_bytes = 0
        self._growth_bytes: float | None = None
        self._num_rounds = 0

    def written(self, num_bytes: int) -> None:
        """This process has stored so many bytes since the last listing."""
        with self._lock:
            self._written_bytes += num_bytes

    def listed(self, num_bytes: int, left_bytes: int) -> None:
        """Listing found `num_bytes`, of which `left_bytes` were left there."""
        with self._lock:
            if self._listed_bytes is not None:
                grown_bytes = max(0, num_bytes - self._listed_bytes)
                self._growth_bytes = grown_bytes / max(1, self._num_rounds)
            self._listed_bytes = left_bytes
            self._is_trusted = True
            self._written_bytes = self._num_rounds = 0

    def distrust(self) -> None:
        """The store is fuller than it should be."""
        with self._lock:
            self._is_trusted = False

    def is_over(self, max_bytes: int, min_bytes: float = 0.0) -> bool:
        """Whether this process wrote `min_bytes` since the last listing, and broke the budget."""
        with self._lock:
            bytes_now = (self._listed_bytes or 0) + self._written_bytes
            return self._written_bytes >= min_bytes and bytes_now > max_bytes

    def is_due(self, max_bytes: int | None) -> bool:
        """Whether the store must be listed now; called once a round."""
        with self._lock:
            self._num_rounds += 1
            if self._listed_bytes is None or self._growth_bytes is None or not self._is_trusted:
                return True
            if self._num_rounds >= RELIST_ROUNDS:
                return True
            grown_bytes = max(self._written_bytes, self._growth_bytes * self._num_rounds)
            return max_bytes is not None and self._listed_bytes + grown_bytes > max_bytes
