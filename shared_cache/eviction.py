"""Eviction policies: which blocks a tier drops to make room.

A block without its parents can never be matched again, so a policy that dropped a prompt's first
block before its last would fill a tier with dead blocks. Policies are therefore told of whole runs,
and rank the blocks of one run from its end. They know nothing of slots, leases or bytes: the tier
asks for victims and says which blocks may not be taken.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

from shared_cache.hashing import BlockHash


class EvictionPolicy(ABC):
    """Ranks the blocks of one tier. Not thread-safe: the tier calls it under its own lock.

    A `run` is consecutive blocks of one chain, first block first.
    """

    @abstractmethod
    def inserted(self, run: Sequence[BlockHash]) -> None:
        """These blocks are in the tier from now on; none of them was before."""

    @abstractmethod
    def accessed(self, run: Sequence[BlockHash]) -> None:
        """These blocks, all of them in the tier, were asked for."""

    @abstractmethod
    def removed(self, block_hash: BlockHash) -> None:
        """This block has left the tier."""

    @abstractmethod
    def victims(
        self, num_blocks: int, may_evict: Callable[[BlockHash], bool]
    ) -> Sequence[BlockHash]:
        """Up to `num_blocks` blocks to drop, best victim first; fewer when too few may go.

        Changes nothing: the tier reports what it really dropped through `removed`.
        """


class LruPolicy(EvictionPolicy):
    """Drops what was not asked for the longest; within one run the last block goes first."""

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[BlockHash, None] = OrderedDict()

    def inserted(self, run: Sequence[BlockHash]) -> None:
        """See `EvictionPolicy.inserted`."""
        for block_hash in reversed(run):
            self._oldest_first[block_hash] = None

    def accessed(self, run: Sequence[BlockHash]) -> None:
        """See `EvictionPolicy.accessed`."""
        for block_hash in reversed(run):
            self._oldest_first.move_to_end(block_hash)

    def removed(self, block_hash: BlockHash) -> None:
        """See `EvictionPolicy.removed`."""
        del self._oldest_first[block_hash]

    def victims(
        self, num_blocks: int, may_evict: Callable[[BlockHash], bool]
    ) -> Sequence[BlockHash]:
        """See `EvictionPolicy.victims`; scans past blocks that may not go."""
        return list(islice(filter(may_evict, self._oldest_first), num_blocks))
