"""Known runs: which object holds a block, as far as this process has seen.

A store has no index server: an object is found by the hash of its first block, and its head names
the others. Remembering the heads saves asking again, and finds blocks in the middle of an object.
It is a hint only: an object may be gone or replaced, so whoever finds that out forgets it here.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from shared_cache.hashing import BlockHash, common_prefix_len
from shared_cache.stores.codec import RunHead

MAX_BLOCKS = 500_000
"""Oldest runs beyond so many blocks are forgotten: about 100 MB, in a process that lives months."""

RUN_COST_BLOCKS = 2
"""A run by itself, its name above all, takes about as much memory as so many blocks more."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block lies: row `row` of the object `name`."""

    name: str
    head: RunHead
    row: int

    def num_common(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of `hashes` lie here one after another."""
        stored = self.head.hashes[self.row :]
        return common_prefix_len(hashes[: len(stored)], stored)


class KnownRuns:
    """The heads seen so far, by block; thread-safe.

    A block maps to the name of its object alone; its row is looked up in the head when it is asked
    for, which is seldom compared with how many blocks are remembered.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._lock = threading.Lock()
        self._heads: OrderedDict[str, RunHead] = OrderedDict()
        self._names: dict[BlockHash, str] = {}

    @property
    def num_blocks(self) -> int:
        """How many blocks are remembered; one that several runs hold counts several times."""
        with self._lock:
            return self._num_blocks - RUN_COST_BLOCKS * len(self._heads)

    @property
    def is_full(self) -> bool:
        """Whether another run would push out an older one."""
        with self._lock:
            return self._num_blocks >= self._max_blocks

    def names(self) -> frozenset[str]:
        """The objects whose heads are remembered."""
        with self._lock:
            return frozenset(self._heads)

    def find(self, block_hash: BlockHash) -> Place | None:
        """Where `block_hash` was seen last."""
        with self._lock:
            name = self._names.get(block_hash)
            if name is None:
                return None
            head = self._heads[name]
        return Place(name, head, head.hashes.index(block_hash))

    def add(self, name: str, head: RunHead) -> None:
        """Remember the head of an object, instead of an older one under the same name.

        Each run counts as `RUN_COST_BLOCKS` blocks more than it has. The newest head stays, however
        long it is.
        """
        with self._lock:
            self._forget(name)
            self._heads[name] = head
            self._num_blocks += len(head.hashes) + RUN_COST_BLOCKS
            self._names.update(dict.fromkeys(head.hashes, name))
            while self._num_blocks > self._max_blocks and len(self._heads) > 1:
                self._forget(next(iter(self._heads)))

    def forget(self, name: str) -> None:
        """The object is gone or not what it was."""
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        head = self._heads.pop(name, None)
        if head is None:
            return
        self._num_blocks -= len(head.hashes) + RUN_COST_BLOCKS
        for block_hash in head.hashes:
            if self._names.get(block_hash) == name:
                del self._names[block_hash]
