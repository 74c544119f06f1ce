"""S3-FIFO (Yang et al., SOSP '23): prompts that never come back do not push out those that do.

Under `LruPolicy` a burst of long one-off prompts empties the whole tier, as the newest block is
always the dearest.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from shared_cache.eviction.policy import MAX_REFUSED, EvictionPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import DEFAULT_RETENTION, Retention

_MAX_FREQUENCY = 3
_MIN_HITS_TO_STAY = 2


class S3FifoPolicy(EvictionPolicy):
    """Drops what was asked for once before what was asked for again: S3-FIFO (SOSP '23).

    New blocks enter a small queue, `small_share` of all. What was hit twice by the time it reaches
    its end goes on to the main queue; the rest leaves, and its name is kept in a ghost queue of
    at most as many names as blocks are here: a block that comes back while it is known enters the
    main queue. So a flood of prompts that never come back passes through the small queue alone.

    A block that may not go moves to the end of the main queue, so that a leased block, or one with
    children, is not offered at every call.
    """

    def __init__(self, small_share: float = 0.1) -> None:
        self._small_share = small_share
        self._small: OrderedDict[BlockHash, int] = OrderedDict()
        self._main: OrderedDict[BlockHash, int] = OrderedDict()
        self._ghost: OrderedDict[BlockHash, None] = OrderedDict()
        self._small_first = False
        """Whether the small queue is searched first: the main one was, in vain, without an end."""

    def inserted(self, run: Sequence[BlockHash], retention: Retention = DEFAULT_RETENTION) -> None:
        """See `EvictionPolicy.inserted`; every retention is the same here."""
        for block_hash in reversed(run):
            if block_hash in self._ghost:
                del self._ghost[block_hash]
                self._main[block_hash] = 0
            else:
                self._small[block_hash] = 0

    def accessed(self, run: Sequence[BlockHash]) -> None:
        """See `EvictionPolicy.accessed`; moves nothing."""
        for block_hash in run:
            queue = self._small if block_hash in self._small else self._main
            queue[block_hash] = min(queue[block_hash] + 1, _MAX_FREQUENCY)

    def removed(self, block_hash: BlockHash) -> None:
        """See `EvictionPolicy.removed`."""
        del (self._small if block_hash in self._small else self._main)[block_hash]
        self._trim_ghost()

    def evict(self, num_blocks: int, try_evict: Callable[[BlockHash], bool]) -> int:
        """See `EvictionPolicy.evict`."""
        refused: list[BlockHash] = []
        num_evicted = 0
        try:
            while (
                num_evicted < num_blocks
                and len(refused) < MAX_REFUSED
                and (queue := self._queue_of_next()) is not None
            ):
                block_hash = next(iter(queue))
                if try_evict(block_hash):
                    num_evicted += 1
                    if queue is self._small:
                        self._ghost[block_hash] = None
                else:
                    refused.append(block_hash)
                del queue[block_hash]
        finally:
            self._small_first = len(refused) >= MAX_REFUSED and not self._small_first
            self._main.update((block_hash, 0) for block_hash in refused)
            self._trim_ghost()
        return num_evicted

    def __len__(self) -> int:
        """See `EvictionPolicy.__len__`."""
        return len(self._small) + len(self._main)

    @property
    def num_remembered(self) -> int:
        """Names in the ghost queue; never more than there are blocks."""
        return len(self._ghost)

    def _queue_of_next(self) -> OrderedDict[BlockHash, int] | None:
        """The queue whose first block goes next; moves those on the way to it that have earned it.

        Each move uses up what the block was hit, so that moves are at most as many as hits.
        """
        while self._small and (
            self._small_first or not self._main or len(self._small) > self._small_share * len(self)
        ):
            block_hash, frequency = next(iter(self._small.items()))
            if frequency < _MIN_HITS_TO_STAY:
                return self._small
            del self._small[block_hash]
            self._main[block_hash] = 0
        while self._main:
            block_hash, frequency = next(iter(self._main.items()))
            if frequency == 0:
                return self._main
            self._main[block_hash] = frequency - 1
            self._main.move_to_end(block_hash)
        return None

    def _trim_ghost(self) -> None:
        while len(self._ghost) > len(self):
            self._ghost.popitem(last=False)
