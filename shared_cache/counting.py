"""What one cache has done, counted while it does so, and gathered from all its parts.

Every part counts what it does itself; what staging does goes through several of them and is counted
here.
"""

import threading
from dataclasses import dataclass

from shared_cache.cache_stats import CacheStats
from shared_cache.cost import CostGate
from shared_cache.host.interface import HostTier
from shared_cache.publishing import Publisher
from shared_cache.tiers import TieredStore


@dataclass(frozen=True, slots=True)
class StagingCounts:
    """See the same names in `CacheStats`."""

    staged_blocks: int = 0
    peer_blocks: int = 0
    deadline_misses: int = 0


class StagingCounter:
    """Counts what is staged; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = StagingCounts()

    @property
    def counts(self) -> StagingCounts:
        """The counts until now."""
        with self._lock:
            return self._counts

    def add(self, staged_blocks: int = 0, peer_blocks: int = 0, deadline_misses: int = 0) -> None:
        """Count so many more."""
        with self._lock:
            before = self._counts
            self._counts = StagingCounts(
                before.staged_blocks + staged_blocks,
                before.peer_blocks + peer_blocks,
                before.deadline_misses + deadline_misses,
            )


def gathered(
    host: HostTier,
    publisher: Publisher,
    tiers: TieredStore,
    gate: CostGate,
    counts: StagingCounts,
    num_faults: int,
) -> CacheStats:
    """A snapshot of a cache of these parts; may ask the owner of the node's memory."""
    host_stats = host.stats()
    tier_stats = publisher.tier_stats()
    gate_stats = gate.stats() if tier_stats else None  # takes milliseconds: no lock is held
    saves = publisher.counts
    return CacheStats(
        host=host_stats,
        staged_blocks=counts.staged_blocks,
        fetched_blocks=sum(tier.read_blocks for tier in tier_stats),
        fetched_bytes=sum(tier.read_bytes for tier in tier_stats),
        fetch_s=tiers.read_s,
        deadline_misses=counts.deadline_misses,
        saved_blocks=saves.saved,
        saved_bytes=saves.saved * host.block_bytes,
        dropped_saves=saves.dropped,
        store_faults=num_faults,
        pending_saves=saves.pending,
        peer_blocks=counts.peer_blocks,
        tiers=tier_stats,
        gate=gate_stats,
    )
