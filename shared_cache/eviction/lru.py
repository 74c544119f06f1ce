"""Least recently used: the policy that needs no knowledge of the traffic."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from shared_cache.eviction.policy import MAX_REFUSED, EvictionPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import DEFAULT_RETENTION, Retention


class LruPolicy(EvictionPolicy):
    """Drops what was not asked for the longest; within one run the last block goes first.

    A block that may not go moves behind all others, so that the next call does not meet it again
    before the rest.
    """

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[BlockHash, None] = OrderedDict()

    def inserted(self, run: Sequence[BlockHash], retention: Retention = DEFAULT_RETENTION) -> None:
        """See `EvictionPolicy.inserted`; every retention is the same here."""
        for block_hash in reversed(run):
            self._oldest_first[block_hash] = None

    def accessed(self, run: Sequence[BlockHash]) -> None:
        """See `EvictionPolicy.accessed`."""
        for block_hash in reversed(run):
            self._oldest_first.move_to_end(block_hash)

    def removed(self, block_hash: BlockHash) -> None:
        """See `EvictionPolicy.removed`."""
        del self._oldest_first[block_hash]

    def evict(self, num_blocks: int, try_evict: Callable[[BlockHash], bool]) -> int:
        """See `EvictionPolicy.evict`."""
        num_evicted = 0
        for num_offered in range(len(self._oldest_first)):
            if num_evicted >= num_blocks or num_offered - num_evicted >= MAX_REFUSED:
                break
            block_hash = next(iter(self._oldest_first))
            if try_evict(block_hash):
                del self._oldest_first[block_hash]
                num_evicted += 1
            else:
                self._oldest_first.move_to_end(block_hash)
        return num_evicted

    def __len__(self) -> int:
        """See `EvictionPolicy.__len__`."""
        return len(self._oldest_first)
