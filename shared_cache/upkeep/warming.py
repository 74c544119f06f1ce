"""Warming: bringing the hottest stored prefixes into host memory before anybody asks for them.

A node that was just started has an empty arena, and its first requests would all wait for the
store. What was used last is used again; a block is of use only with all blocks before it, so whole
prefixes are brought in, from their first block on, and only into memory that is free: what running
replicas use is never pushed out for a guess.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostClaim, HostTier, NewRun
from shared_cache.stores.store import BlockStore, StoredRun

GROUP_BLOCKS = 32
"""Blocks that are read and published together."""

WAIT_S = 5.0
"""How long to wait for a block that a replica is fetching at the same moment."""


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """Consecutive stored blocks, from the first of their chain on; `root` precedes them."""

    root: BlockHash
    hashes: tuple[BlockHash, ...]


def hottest_prefixes(runs: Iterable[StoredRun], max_blocks: int) -> Iterator[StoredPrefix]:
    """Stored prefixes, last used first, until they hold `max_blocks` different blocks.

    A prefix that is part of one given before is left out; the last one may be cut short.
    """
    ordered = sorted(runs, key=lambda run: (-run.used_s, run.name))
    places = {h: (run, row) for run in reversed(ordered) for row, h in enumerate(run.hashes)}
    given: set[BlockHash] = set()
    for run in ordered:
        if len(given) >= max_blocks:
            return
        if run.hashes[-1] in given:
            continue
        prefix = _whole(run, places)
        hashes = _without_excess(prefix.hashes, given, max_blocks - len(given))
        given.update(hashes)
        yield StoredPrefix(prefix.root, hashes)


def warm_prefix(
    host: HostTier,
    store: BlockStore,
    prefix: StoredPrefix,
    pin_s: float = 0.0,
    *,
    is_shared: bool = False,
) -> int:
    """Bring `prefix` into host memory; how many of its leading blocks are there now.

    Fewer than all when the memory is full or a block cannot be read. Pins them for `pin_s` seconds.
    `is_shared`: the store is the shared tier of those who use this memory; else they are left to
    store there what they use.
    """
    num_here = 0
    while num_here < len(prefix.hashes):
        num_before, end = num_here, num_here + GROUP_BLOCKS
        claim = host.claim(prefix.hashes[:end], WAIT_S)
        num_here = len(claim.lease.slots)
        asked = [prefix.hashes[index] for index in claim.lease.to_store]
        try:
            host.stored(asked, is_shared)
            if claim.slots:
                num_here += _fill(host, store, prefix, claim, is_shared)
        finally:
            host.release(claim.lease)
        if num_here == num_before:
            break
    if num_here and pin_s > 0:
        host.pin(prefix.hashes[:num_here], pin_s)
    return num_here


def _fill(
    host: HostTier, store: BlockStore, prefix: StoredPrefix, claim: HostClaim, is_shared: bool
) -> int:
    """Read and publish the claimed blocks; how many of them are in host memory now."""
    start = len(claim.lease.slots)
    wanted = prefix.hashes[start : start + len(claim.slots)]
    num_good = 0
    try:
        checksums = store.read_into(wanted, [host.buffer(slot) for slot in claim.slots])
        num_good = len(checksums)
    finally:
        host.cancel(claim.slots[num_good:])
    if not num_good:
        return 0
    parent = prefix.hashes[start - 1] if start else prefix.root
    run = NewRun(parent, wanted[:num_good], is_stored=is_shared, checksums=checksums)
    lease = host.commit(claim.slots[:num_good], run)
    host.stored([run.hashes[position] for position in lease.to_store], is_stored=False)
    host.release(lease)
    return len(lease.slots)


def _whole(run: StoredRun, places: Mapping[BlockHash, tuple[StoredRun, int]]) -> StoredPrefix:
    """`run` with all stored blocks before it."""
    parts = [run.hashes]
    seen = {run.name}
    parent = run.parent
    while parent in places:
        holder, row = places[parent]
        if holder.name in seen:  # forged: real hashes form no circle
            break
        seen.add(holder.name)
        parts.append(holder.hashes[: row + 1])
        parent = holder.parent
    return StoredPrefix(parent, tuple(h for part in reversed(parts) for h in part))


def _without_excess(
    hashes: Sequence[BlockHash], given: set[BlockHash], room_blocks: int
) -> tuple[BlockHash, ...]:
    """The leading `hashes` of which at most `room_blocks` are not among `given`."""
    for index, block_hash in enumerate(hashes):
        if block_hash not in given:
            if not room_blocks:
                return tuple(hashes[:index])
            room_blocks -= 1
    return tuple(hashes)
