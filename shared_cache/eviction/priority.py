"""Priorities with an end: what a caller called worth keeping is kept, but not for ever.

Without the end, a tier would fill up with blocks that were once important.
"""

from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from shared_cache.eviction.lru import LruPolicy
from shared_cache.eviction.policy import EvictionPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import DEFAULT_PRIORITY, DEFAULT_RETENTION, Retention


class PriorityPolicy(EvictionPolicy):
    """Drops the lowest priority first, and within one priority as `LruPolicy`.

    A block whose priority has run out counts as if it had been asked for at that moment. The limit
    on refusals is one for each priority, or those of the lowest would hide all others. `clock`
    gives seconds and never goes back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._queues: dict[int, LruPolicy] = {}
        self._priority_of: dict[BlockHash, int] = {}
        self._expiries = _Expiries()

    def inserted(self, run: Sequence[BlockHash], retention: Retention = DEFAULT_RETENTION) -> None:
        """See `EvictionPolicy.inserted`."""
        self._queue(retention.priority).inserted(run)
        if retention.priority == DEFAULT_PRIORITY:
            return
        self._priority_of.update(dict.fromkeys(run, retention.priority))
        if retention.ttl_s is not None:
            self._expiries.add(run, self._clock() + retention.ttl_s)

    def accessed(self, run: Sequence[BlockHash]) -> None:
        """See `EvictionPolicy.accessed`; does not prolong a priority."""
        # A run may mix priorities; `LruPolicy` wants each block by itself then, last one first.
        for block_hash in reversed(run):
            self._queue_of(block_hash).accessed((block_hash,))

    def removed(self, block_hash: BlockHash) -> None:
        """See `EvictionPolicy.removed`."""
        self._queue_of(block_hash).removed(block_hash)
        self._forget(block_hash)

    def evict(self, num_blocks: int, try_evict: Callable[[BlockHash], bool]) -> int:
        """See `EvictionPolicy.evict`."""
        self._demote_expired()

        def try_and_forget(block_hash: BlockHash) -> bool:
            if not try_evict(block_hash):
                return False
            self._forget(block_hash)
            return True

        num_evicted = 0
        for priority in sorted(self._queues):
            if num_evicted >= num_blocks:
                break
            queue = self._queues[priority]
            num_evicted += queue.evict(num_blocks - num_evicted, try_and_forget)
            if not queue:
                del self._queues[priority]
        return num_evicted

    def __len__(self) -> int:
        """See `EvictionPolicy.__len__`."""
        return sum(map(len, self._queues.values()))

    @property
    def num_waiting_ends(self) -> int:
        """Ends of priorities that are still to come, and some of blocks that have left."""
        return len(self._expiries)

    def _queue(self, priority: int) -> LruPolicy:
        return self._queues.setdefault(priority, LruPolicy())

    def _queue_of(self, block_hash: BlockHash) -> LruPolicy:
        return self._queue(self._priority_of.get(block_hash, DEFAULT_PRIORITY))

    def _forget(self, block_hash: BlockHash) -> None:
        self._priority_of.pop(block_hash, None)
        self._expiries.discard(block_hash)

    def _demote_expired(self) -> None:
        for block_hash in self._expiries.pop_until(self._clock()):
            self._queue_of(block_hash).removed(block_hash)
            del self._priority_of[block_hash]
            self._queue(DEFAULT_PRIORITY).inserted((block_hash,))


class _Expiries:
    """When the priorities of blocks run out. What was discarded leaves the heap a little later."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, BlockHash]] = []
        self._entry_of: dict[BlockHash, tuple[float, int, BlockHash]] = {}
        self._numbers = count()

    def add(self, run: Sequence[BlockHash], at_s: float) -> None:
        """From now on the blocks of `run` expire at `at_s`, the last block first."""
        for block_hash in reversed(run):
            entry = (at_s, next(self._numbers), block_hash)
            self._entry_of[block_hash] = entry
            heappush(self._heap, entry)

    def discard(self, block_hash: BlockHash) -> None:
        """Forget one block, if it is known here."""
        self._entry_of.pop(block_hash, None)
        if len(self._heap) > 2 * len(self._entry_of) + 64:
            self._heap = list(self._entry_of.values())
            heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def pop_until(self, now_s: float) -> Iterator[BlockHash]:
        """Forget and give the blocks that have expired, in the order in which they did."""
        while self._heap and self._heap[0][0] <= now_s:
            entry = heappop(self._heap)
            block_hash = entry[-1]
            if self._entry_of.get(block_hash) is entry:
                del self._entry_of[block_hash]
                yield block_hash
