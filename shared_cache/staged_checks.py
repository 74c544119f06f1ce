"""Blocks that are checked again when they are leased: what is damaged ends the prefix there.

Memory that flips a bit, or a process that writes where it must not, would else be loaded into every
engine that asks. Off by default, as it reads every byte of a prefix.
"""

from collections.abc import Sequence
from dataclasses import replace

from shared_cache.errors import CorruptBlockError
from shared_cache.faults import FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostTier
from shared_cache.integrity import num_intact
from shared_cache.staged import StagedPrefix


def verified(
    staged: StagedPrefix, hashes: Sequence[BlockHash], start: int, host: HostTier, faults: FaultLog
) -> StagedPrefix:
    """`staged` up to the first of its blocks from `start` on that is damaged; takes over `staged`.

    A damaged block is counted, and dropped from the host tier.
    """
    slots = staged.lease.slots[start - staged.first :]
    buffers, checksums = map(host.buffer, slots), map(host.checksum, slots)
    index = start + num_intact(hashes[start : staged.end], list(buffers), list(checksums))
    if index == staged.end:
        return staged
    damage = CorruptBlockError(f"block {hashes[index].hex()} is damaged")
    faults.record("the host tier", damage)
    owed = [hashes[staged.first + place] for place in staged.lease.to_store]
    if owed:
        host.stored(owed, is_stored=False)  # before the lease ends, and its blocks go
    good = host.lease_held(hashes[staged.first : index])
    host.release(staged.lease)
    host.drop([hashes[index]])
    return replace(staged, lease=good)
