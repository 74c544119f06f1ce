"""How many blocks in host memory are still what they were when they came, on several cores at once.

A block is checked when it enters host memory. Whoever fears broken memory, or a broken process that
writes where it may not, has it checked whenever it is leased too; one core would make that as slow
as the copy itself.
"""

from collections.abc import Sequence
from functools import partial

from shared_cache.checksum import block_checksum
from shared_cache.hashing import BlockHash
from shared_cache.parallel import run_all

BLOCKS_PER_JOB = 8


def num_intact(
    hashes: Sequence[BlockHash], buffers: Sequence[memoryview], checksums: Sequence[int]
) -> int:
    """How many leading blocks have the checksum that they should have."""
    starts = range(0, len(hashes), BLOCKS_PER_JOB)
    parts = [slice(start, start + BLOCKS_PER_JOB) for start in starts]
    jobs = [partial(_num_intact, hashes[one], buffers[one], checksums[one]) for one in parts]
    for start, num_good in zip(starts, run_all(jobs), strict=True):
        if num_good < BLOCKS_PER_JOB:  # or the last part, which may be shorter
            return start + num_good
    return len(hashes)


def _num_intact(
    hashes: Sequence[BlockHash], buffers: Sequence[memoryview], checksums: Sequence[int]
) -> int:
    blocks = zip(hashes, buffers, checksums, strict=True)
    for index, (name, buffer, checksum) in enumerate(blocks):
        if block_checksum(name, buffer) != checksum:
            return index
    return len(hashes)
