"""The host tier of one process: an index, and one arena of memory for the blocks' bytes.

One mapping for all blocks, never grown and never given back: a fresh allocation per block costs
ten times the copy itself, because the system has to find and clear the memory first. Nothing is
touched at start, so memory that is never used is never taken.
"""

import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress

from shared_cache.errors import ConfigError
from shared_cache.eviction import EvictionPolicy, LruPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.index import HostIndex
from shared_cache.host.interface import HostLease, HostStats, HostTier

SLOT_ALIGNMENT_BYTES = 4096
"""Slots begin at multiples of this, so that stores may read into them past the system's cache."""


class LocalHostTier(HostTier):
    """Verified blocks in this process's memory, seen by this process alone."""

    def __init__(
        self, host_bytes: int, block_bytes: int, policy: EvictionPolicy | None = None
    ) -> None:
        """Map `host_bytes` for blocks of `block_bytes`; least recently used goes first by default.

        Raises `ConfigError` when not even one block fits, or the system refuses the memory.
        """
        slot_bytes = -(-block_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES
        num_slots = host_bytes // slot_bytes
        if num_slots < 1:
            raise ConfigError(
                f"cache.host_bytes ({host_bytes}) holds not even one block: a block of this model "
                f"takes {slot_bytes} bytes; set it to room for at least one long prompt"
            )
        self._arena = memoryview(_map_memory(num_slots * slot_bytes))
        self._lock = threading.Lock()
        self._index = HostIndex(num_slots, block_bytes, policy or LruPolicy())
        self._num_slots = num_slots
        self._block_bytes = block_bytes
        self._slot_bytes = slot_bytes

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """See `HostTier.match`."""
        with self._lock:
            return self._index.match(hashes)

    def lease(self, hashes: Sequence[BlockHash]) -> HostLease:
        """See `HostTier.lease`."""
        with self._lock:
            return self._index.lease(hashes)

    def release(self, lease: HostLease) -> None:
        """See `HostTier.release`."""
        with self._lock:
            self._index.release(lease)

    def reserve(self, num_slots: int) -> tuple[int, ...]:
        """See `HostTier.reserve`."""
        with self._lock:
            return self._index.reserve(num_slots)

    def commit(self, slots: Sequence[int], hashes: Sequence[BlockHash]) -> HostLease:
        """See `HostTier.commit`."""
        with self._lock:
            return self._index.commit(slots, hashes)

    def cancel(self, slots: Sequence[int]) -> None:
        """See `HostTier.cancel`."""
        with self._lock:
            self._index.cancel(slots)

    def buffer(self, slot: int) -> memoryview:
        """See `HostTier.buffer`; begins at a multiple of `SLOT_ALIGNMENT_BYTES`."""
        if not 0 <= slot < self._num_slots:
            raise ValueError(f"slot {slot} is not one of the {self._num_slots} slots")
        start = slot * self._slot_bytes
        return self._arena[start : start + self._block_bytes]

    def stats(self) -> HostStats:
        """See `HostTier.stats`."""
        with self._lock:
            return self._index.stats()


def _map_memory(num_bytes: int) -> mmap.mmap:
    """Private anonymous memory that starts on a system boundary and is not touched yet."""
    try:
        arena = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the system refuses {num_bytes} bytes of memory ({error}); lower cache.host_bytes"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # only advice; kernels without huge memory refuse it
            arena.madvise(mmap.MADV_HUGEPAGE)
    return arena
