"""A cache that has what a test says, where a test says, and notes what was asked of it."""

from array import array
from collections.abc import Callable, Sequence

from shared_cache.cache_stats import CacheStats
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope
from shared_cache.host.interface import HostLease, HostStats, Place
from shared_cache.pacing import TurnBudget
from shared_cache.prefix_cache import StagedPrefix


class ScriptedCache:
    """A `PrefixCache` whose host memory has the first `num_here` blocks of every prompt.

    `slots[rank][i]` is the slot of a prompt's block i on that rank. `on_lease` and `on_grow` are
    called first, and may wait or raise. With `num_stored` more blocks than are here, `grow` brings
    them.
    """

    def __init__(
        self, slots: Sequence[Sequence[int]] = (range(1 << 20),), num_here: int = 0
    ) -> None:
        self.slots = slots
        self.num_here = num_here
        self.num_stored = 0
        self.on_lease: Callable[[], None] = lambda: None
        self.on_grow: Callable[[], None] = lambda: None
        self.deadline_s = 1.0
        self.is_flush_hopeless = False
        self.turn_budget = TurnBudget(0.1)
        self.num_blocks = 1 << 20
        self.num_reserved_ahead: int | None = None
        self.leases: dict[int, int] = {}
        self.asked: list[str] = []
        self.num_deadline_misses = 0
        self.num_lost = 0
        self._num_leases = 0

    def reserve_more_ahead(self) -> None:
        self.asked.append("reserve_more_ahead")

    def lease(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        self.asked.append("lease")
        self.on_lease()
        return self._staged(first, min(len(hashes), self.num_here))

    def lease_held(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        self.asked.append("lease_held")
        return self._staged(first, min(len(hashes), self.num_here))

    def can_fetch(self, hashes: Sequence[BlockHash], start: int) -> bool:
        return start < min(len(hashes), self.num_stored)

    def grow(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], deadline_s: float | None = None
    ) -> StagedPrefix:
        self.asked.append("grow")
        self.release(staged)
        self.on_grow()
        return self._staged(staged.first, min(len(hashes), max(self.num_here, self.num_stored)))

    def places(self, staged: StagedPrefix) -> tuple[Place, ...]:
        chosen = slice(staged.first, staged.end)
        return tuple(Place(b"arena", array("I", one[chosen])) for one in self.slots)

    def release(self, staged: StagedPrefix) -> None:
        self.leases.pop(staged.lease.lease_id, None)

    def miss_deadline(self) -> None:
        self.num_deadline_misses += 1

    def lose(self, num_blocks: int) -> None:
        self.num_lost += num_blocks

    def flush(self, timeout_s: float) -> bool:
        return True

    def stats(self) -> CacheStats:
        host = HostStats(1, 1, 0, 0, len(self.leases), 0, 1)
        return CacheStats(host, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0)

    def close(self, timeout_s: float = 1.0) -> None:
        pass

    def _staged(self, first: int, end: int) -> StagedPrefix:
        self._num_leases += 1
        lease = HostLease(self._num_leases, tuple(range(first, end)))
        if lease.slots:
            self.leases[lease.lease_id] = len(lease.slots)
        return StagedPrefix(lease, first=first)
