"""Known runs: which object holds a block, as far as this process has seen.

A store has no index server: an object is found by the hash of its first block, and its head names
the others. Remembering the heads saves asking again, and finds blocks in the middle of an object.
It is a hint only: an object may be gone or replaced, so whoever finds that out forgets it here.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from shared_cache.codec import RunHead
from shared_cache.hashing import BlockHash, common_prefix_len

MAX_RUNS = 100_000
"""Oldest runs beyond this are forgotten, so that a process that lives for months stays small."""


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
    """The heads seen so far, by block; thread-safe."""

    def __init__(self, max_runs: int = MAX_RUNS) -> None:
        self._max_runs = max_runs
        self._lock = threading.Lock()
        self._heads: OrderedDict[str, RunHead] = OrderedDict()
        self._places: dict[BlockHash, Place] = {}

    def find(self, block_hash: BlockHash) -> Place | None:
        """Where `block_hash` was seen last."""
        with self._lock:
            return self._places.get(block_hash)

    def add(self, name: str, head: RunHead) -> None:
        """Remember the head of an object, instead of an older one under the same name."""
        with self._lock:
            self._forget(name)
            self._heads[name] = head
            self._places.update({h: Place(name, head, row) for row, h in enumerate(head.hashes)})
            if len(self._heads) > self._max_runs:
                self._forget(next(iter(self._heads)))

    def forget(self, name: str) -> None:
        """The object is gone or not what it was."""
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        head = self._heads.pop(name, None)
        for block_hash in head.hashes if head else ():
            place = self._places.get(block_hash)
            if place is not None and place.name == name:
                del self._places[block_hash]
