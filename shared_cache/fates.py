"""What became of blocks that this process computed or read: for whoever asks why one is missing.

A miss looks the same whether a block was never there, was evicted, or was dropped on its way to the
store. The process that had the block knows, for a while. Bounded; thread-safe.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shared_cache.hashing import BlockHash
from shared_cache.stores.store_faults import StoreFaults

FateKind = Literal["published", "stored", "dropped"]
"""In host memory and not stored yet; in the shared tier; never got there."""

MAX_FATES = 1 << 16


class Fate(NamedTuple):
    """What happened to a block, and when (seconds since the epoch)."""

    kind: FateKind
    at_s: float


NO_FAULTS = StoreFaults(corrupt=0, foreign=0, vanished=0)


@dataclass(frozen=True, slots=True)
class BlockState:
    """What one replica knows of one block; `is_stored` is None when its store did not say.

    `faults` counts the objects that were not what they should be, of all blocks since its start.
    """

    is_in_host: bool
    is_stored: bool | None
    fate: Fate | None
    faults: StoreFaults = NO_FAULTS


class Fates:
    """The last fate of each of the last `max_blocks` blocks that something happened to."""

    def __init__(self, max_blocks: int = MAX_FATES) -> None:
        self._max_blocks = max_blocks
        self._lock = threading.Lock()
        self._fates: OrderedDict[BlockHash, Fate] = OrderedDict()

    def note(self, hashes: Sequence[BlockHash], kind: FateKind) -> None:
        """This happened to these blocks just now."""
        fate = Fate(kind, time.time())
        with self._lock:
            for block_hash in hashes:
                self._fates[block_hash] = fate
                self._fates.move_to_end(block_hash)
            while len(self._fates) > self._max_blocks:
                self._fates.popitem(last=False)

    def hashes(self) -> list[BlockHash]:
        """All blocks that something is known of."""
        with self._lock:
            return list(self._fates)

    def of(self, block_hash: BlockHash) -> Fate | None:
        """What happened last; None when that is not known, or not any more."""
        with self._lock:
            return self._fates.get(block_hash)
