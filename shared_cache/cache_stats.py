"""What one replica's cache has done: the counters that everything else reports from."""

from dataclasses import dataclass

from shared_cache.cost import GateStats
from shared_cache.host.interface import HostStats
from shared_cache.tiers import TierStats


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of one replica's cache since its start.

    All but `host`, `pending_saves` and `gate` only grow. `staged_blocks` were leased for requests
    (again for one that had to wait for its turn); `peer_blocks` of them were brought by another
    process of this machine, `fetched_blocks` came from the tiers behind host memory. `fetch_s` are
    the seconds in which at least one such read was under way. `saved_blocks` were written to the
    shared tier (those that it had already do not count), `dropped_saves` and `pending_saves` are
    blocks too. `deadline_misses` are requests that ran out of time. `tiers` are in the order of the
    configuration; `gate` is None without tiers.
    """

    host: HostStats
    staged_blocks: int
    fetched_blocks: int
    fetched_bytes: int
    fetch_s: float
    deadline_misses: int
    saved_blocks: int
    saved_bytes: int
    dropped_saves: int
    store_faults: int
    pending_saves: int
    peer_blocks: int = 0
    tiers: tuple[TierStats, ...] = ()
    gate: GateStats | None = None
