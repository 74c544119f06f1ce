"""The host tier of one process: an index, and one arena of memory for the blocks' bytes.

One mapping for all blocks, never grown and never given back: a fresh allocation per block costs
ten times the copy itself, because the system has to find and clear the memory first. Nothing is
touched at start, so memory that is never used is never taken.
"""

import logging
import mmap
import threading
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

from shared_cache.checksum import block_checksum
from shared_cache.errors import ConfigError, HostMemoryGoneError
from shared_cache.eviction import make_policy
from shared_cache.faults import FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES, slot_bytes_of
from shared_cache.host.index import HostIndex
from shared_cache.host.interface import (
    HostClaim,
    HostLease,
    HostStats,
    HostTier,
    MemoryHook,
    NewRun,
    Place,
    PlacedBlocks,
)
from shared_cache.host.terms import BlockRecord, Claim, Clock, Grant, IndexRules, checked_ttl_s

logger = logging.getLogger(__name__)

LRU_RULES = IndexRules(lambda clock: make_policy("lru", clock))

_HOLDER = 0


class LocalHostTier(HostTier):
    """Verified blocks in this process's memory, seen by this process alone."""

    def __init__(
        self,
        host_bytes: int,
        block_bytes: int,
        rules: IndexRules = LRU_RULES,
        clock: Clock = time.monotonic,
    ) -> None:
        """Map `host_bytes` for blocks of `block_bytes`; least recently used goes first by default.

        Raises `ConfigError` when not even one block fits, or the system refuses the memory.
        """
        slot_bytes = slot_bytes_of(block_bytes)
        self._num_slots = host_bytes // slot_bytes
        if self._num_slots < 1:
            raise ConfigError(
                f"cache.host.bytes ({host_bytes}) holds not even one block: a block of this model "
                f"takes {slot_bytes} bytes; set it to room for at least one long prompt"
            )
        self._arena_bytes = self._num_slots * slot_bytes
        self._arena = memoryview(_map_memory(self._arena_bytes))
        self._block_bytes = block_bytes
        self._faults = FaultLog(logger)
        self._slot_stride = slot_bytes // SLOT_ALIGNMENT_BYTES
        self._changed = threading.Condition()  # its lock guards the index and what follows it
        self._checksums = _Checksums()
        self._index = HostIndex(self._arena_bytes, self._arena_bytes, rules, self._checksums, clock)
        self._namespace = self._index.open_namespace("", block_bytes)
        self._index.attach(_HOLDER, self._namespace)
        self._slots_of: dict[int, tuple[int, ...]] = {}  # by lease
        self._lease_ids = count(1)

    @property
    def num_slots(self) -> int:
        """See `HostTier.num_slots`."""
        return self._num_slots

    @property
    def block_bytes(self) -> int:
        """See `HostTier.block_bytes`."""
        return self._block_bytes

    def lease(self, hashes: Sequence[BlockHash], first: int = 0) -> HostLease:
        """See `HostTier.lease`."""
        with self._changed:
            return self._lease_of(self._index.lease(_HOLDER, self._namespace, hashes, first))

    def lease_held(self, hashes: Sequence[BlockHash]) -> HostLease:
        """See `HostTier.lease_held`; leases all that is here."""
        with self._changed:
            grant = self._index.lease(_HOLDER, self._namespace, hashes, 0)
            declined = [hashes[index] for index in grant.to_store]
            self._index.stored(_HOLDER, self._namespace, declined, False)
            return self._lease_of(replace(grant, to_store=()))

    def release(self, lease: HostLease) -> None:
        """See `HostTier.release`."""
        with self._changed:
            self._index.release(_HOLDER, self._slots_of.pop(lease.lease_id, ()))

    def claim(self, hashes: Sequence[BlockHash], wait_s: float = 0.0) -> HostClaim:
        """See `HostTier.claim`; here it is other threads that write."""
        with self._changed:
            claim = self._index.claim(_HOLDER, self._namespace, hashes)
            num_here = len(claim.grant.slots)
            if claim.is_coming and not claim.slots and wait_s > 0:
                awaited = hashes[num_here]
                self._changed.wait_for(
                    lambda: not self._index.is_coming(self._namespace, awaited), wait_s
                )
                rest = self._index.claim(_HOLDER, self._namespace, hashes[num_here:])
                claim = Claim(_joined(claim.grant, rest.grant), rest.slots, rest.is_coming)
            return HostClaim(self._lease_of(claim.grant), claim.slots, claim.is_coming)

    def reserve(self, num_slots: int) -> tuple[int, ...]:
        """See `HostTier.reserve`."""
        with self._changed:
            return self._index.reserve(_HOLDER, self._namespace, num_slots)

    def commit(self, slots: Sequence[int], run: NewRun) -> HostLease:
        """See `HostTier.commit`."""
        if not run.checksums:
            payloads = map(self.buffer, slots)
            run = replace(run, checksums=tuple(map(block_checksum, run.hashes, payloads)))
        with self._changed:
            grant = self._index.commit(_HOLDER, self._namespace, slots, run)
            self._changed.notify_all()
            return self._lease_of(grant)

    def cancel(self, slots: Sequence[int]) -> None:
        """See `HostTier.cancel`."""
        with self._changed:
            self._index.cancel(_HOLDER, slots)
            self._changed.notify_all()

    def stored(self, hashes: Sequence[BlockHash], is_stored: bool) -> None:
        """See `HostTier.stored`."""
        with self._changed:
            self._index.stored(_HOLDER, self._namespace, hashes, is_stored)

    def in_use(self, hashes: Sequence[BlockHash]) -> frozenset[BlockHash]:
        """See `HostTier.in_use`."""
        with self._changed:
            found = self._index.in_use(self._namespace, hashes)
        return frozenset(hashes[position] for position in found)

    def pin(self, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """See `HostTier.pin`."""
        with self._changed:
            return self._index.pin(self._namespace, hashes, checked_ttl_s(ttl_s) or 0.0)

    def drop(self, hashes: Sequence[BlockHash]) -> int:
        """See `HostTier.drop`."""
        with self._changed:
            return self._index.drop(self._namespace, hashes)

    def buffer(self, slot: int) -> memoryview:
        """See `HostTier.buffer`; begins at a multiple of `SLOT_ALIGNMENT_BYTES`."""
        start = slot * SLOT_ALIGNMENT_BYTES
        if slot % self._slot_stride or not 0 <= start < self._arena_bytes:
            raise ValueError(f"slot {slot} is not one of the {self._num_slots} slots")
        return self._arena[start : start + self._block_bytes]

    def place(self, slots: Sequence[int]) -> Place:
        """See `HostTier.place`: in this process's own memory."""
        return Place(b"", array("I", [slot // self._slot_stride for slot in slots]))

    def blocks_at(self, place: Place) -> PlacedBlocks:
        """See `HostTier.blocks_at`; only this process can have leased them."""
        if place.memory:
            raise HostMemoryGoneError(
                "blocks in the memory of a node's arena were promised to a process that has "
                "cache.host.scope process; write scope: node for all ranks of an engine"
            )
        stride_bytes = self._slot_stride * SLOT_ALIGNMENT_BYTES
        starts = [index * stride_bytes for index in place.slots]
        if starts and not 0 <= min(starts) <= max(starts) < self._arena_bytes:
            raise ValueError("a place beyond the host tier's memory")
        return PlacedBlocks(self._arena, starts, self._block_bytes)

    def checksum(self, slot: int) -> int:
        """See `HostTier.checksum`."""
        return self._checksums.of_slot[slot]

    def show_memory(self, hook: MemoryHook) -> None:
        """See `HostTier.show_memory`; all of it, now."""
        with self._faults.caught("preparing the host tier"):
            hook(self._arena)

    def stats(self) -> HostStats:
        """See `HostTier.stats`."""
        with self._changed:
            return self._index.stats(self._namespace)

    def _lease_of(self, grant: Grant) -> HostLease:
        lease_id = next(self._lease_ids)
        if grant.slots:
            self._slots_of[lease_id] = grant.slots
        return HostLease(lease_id, grant.slots, grant.to_store, grant.num_from_peers)


class _Checksums:
    """Keeps each block's checksum while the block is here: a `Journal` of memory alone."""

    def __init__(self) -> None:
        self.of_slot: dict[int, int] = {}

    def reserved(self, slot: int, holder: int) -> None:
        pass

    def published(self, slot: int, namespace: int, record: BlockRecord, checksum: int) -> None:
        self.of_slot[slot] = checksum

    def stored(self, slot: int) -> None:
        pass

    def freed(self, slot: int) -> None:
        self.of_slot.pop(slot, None)

    def extent_assigned(self, extent: int, namespace: int, slot_bytes: int) -> bool:
        return True


def _joined(first: Grant, rest: Grant) -> Grant:
    """The grant of a run from the grants of its two parts."""
    to_store = (*first.to_store, *(len(first.slots) + index for index in rest.to_store))
    num_from_peers = first.num_from_peers + rest.num_from_peers
    return Grant(first.slots + rest.slots, to_store, num_from_peers)


def _map_memory(num_bytes: int) -> mmap.mmap:
    """Private anonymous memory that starts on a system boundary and is not touched yet."""
    try:
        arena = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the system refuses {num_bytes} bytes of memory ({error}); lower cache.host.bytes"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # only advice; kernels without huge memory refuse it
            arena.madvise(mmap.MADV_HUGEPAGE)
    return arena
