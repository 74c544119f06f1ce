"""Staging: the fallible part of a cache hit, done while the request waits outside the engine.

TensorRT-LLM's connector interface has no way to say "this load failed": tokens once promised count
as computed. So everything that can fail (fetch, length, checksum, namespace) happens here, before
the engine hears of the blocks; what is offered afterwards is verified, in this node's memory and
leased. Any fault of any store is then a shorter prefix, never an exception in the engine's step.

Saves go the other way in the background, through a bounded queue that drops under pressure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared_cache.config import CacheConfig
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostStats, HostTier
from shared_cache.namespace import Namespace
from shared_cache.store import BlockStore


@dataclass(frozen=True, slots=True)
class StagedPrefix:
    """The leading blocks of a request that are verified in host memory and leased.

    `fetched` holds the indices of the blocks that this request waited for from the shared tier;
    the others were in host memory already.
    """

    lease: HostLease
    fetched: frozenset[int]

    @property
    def num_blocks(self) -> int:
        """How many leading blocks are staged."""
        return len(self.lease.slots)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of one replica's cache since its start; all but `host` only grow."""

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


class SharedCache:
    """One replica's view of the cache: a host tier, the shared tier behind it, and what moves."""

    def __init__(self, host: HostTier, store: BlockStore | None, config: CacheConfig) -> None:
        self.host = host
        raise NotImplementedError

    def stage(self, hashes: Sequence[BlockHash], deadline_s: float | None = None) -> StagedPrefix:
        """Bring the leading blocks of `hashes` into host memory and lease them.

        Blocks the caller for at most `deadline_s` (default: the configured one); what has not
        arrived by then keeps coming in the background for a later request. Concurrent calls fetch
        a block once. Never raises for a fault of the store. Release with `release`.
        """
        raise NotImplementedError

    def release(self, staged: StagedPrefix) -> None:
        """End the lease of `stage`; a second release is a no-op."""
        raise NotImplementedError

    def save(self, slots: Sequence[int], parent: BlockHash, hashes: Sequence[BlockHash]) -> None:
        """Take reserved, written host slots: publish them and write them to the shared tier.

        Returns at once and never raises; under pressure the write is dropped and counted, the
        blocks stay in host memory.
        """
        raise NotImplementedError

    def flush(self, timeout_s: float) -> bool:
        """Wait until every queued save is written; False when time ran out."""
        raise NotImplementedError

    def stats(self) -> CacheStats:
        """A snapshot; cheap."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the threads; queued saves are dropped (call `flush` before)."""
        raise NotImplementedError


def open_cache(config: CacheConfig, namespace: Namespace) -> SharedCache:
    """The cache that `config` describes, for one replica.

    Raises `ConfigError` when the store's URL or options are wrong, or the store cannot be reached
    or is not a place to write to (the text says how to mend it). A store that may only be read
    is used for reading, with a warning.
    """
    raise NotImplementedError
