"""The bytes that every method moves: equal in every process that is given the same numbers.

A prefix of blocks is put from a page-aligned source and got in prefix order into a pool at random
slots, as a paged pool has them. Both are touched beforehand, so that no method pays for first
touches of fresh memory but its own. Imports numpy alone, as rivals run it in their environments.
"""

import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

PREFIX_BLOCKS = 64
"""Blocks that are put at a time, or that one small request has: 2,048 tokens."""

REQUEST_BLOCKS = 256
"""Blocks of one request's prefix that are got: 8,192 tokens."""


class Workload:
    """`source[i]` is block i; it belongs into `pool[slots[i]]`."""

    def __init__(self, block_bytes: int, num_blocks: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        self.source = aligned_blocks(num_blocks, block_bytes)
        for block in self.source:
            block[:] = np.frombuffer(generator.bytes(block_bytes), np.uint8)
        self.slots: list[int] = generator.permutation(num_blocks).tolist()
        self.pool = aligned_blocks(num_blocks, block_bytes)
        self.clear_pool()

    def prefixes(self, size: int = PREFIX_BLOCKS) -> Iterator[range]:
        """The blocks of one request after the other."""
        for start in range(0, self.num_blocks, size):
            yield range(start, min(start + size, self.num_blocks))

    def clear_pool(self) -> None:
        """Overwrite what the last get has brought, so that the next check means something."""
        self.pool.fill(0xA5)

    def check_pool(self) -> None:
        """Raise `RuntimeError` unless every block is in its slot."""
        for number, slot in enumerate(self.slots):
            if not np.array_equal(self.pool[slot], self.source[number]):
                raise RuntimeError(f"block {number} did not arrive in slot {slot}")


def aligned_blocks(num_blocks: int, block_bytes: int) -> Bytes:
    """A page-aligned array of blocks; huge pages where the system gives them."""
    memory = mmap.mmap(-1, num_blocks * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)


def empty_folder(folder: Path) -> None:
    """Make the folder, or delete what is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
