"""What every eviction policy promises the tier, and the tier the policy.

A policy that needed the tier's leases or the tree of blocks could only be tested together with
them. It offers blocks instead, and the tier says yes or no.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from shared_cache.hashing import BlockHash
from shared_cache.host.interface import DEFAULT_RETENTION, Retention

MAX_REFUSED = 2048
"""After so many refusals in a call (1 to 2 ms) a policy gives up: everybody else waits for it."""


class EvictionPolicy(ABC):
    """Ranks the blocks of one tier (or of one tenant in it). Not thread-safe.

    A `run` is consecutive blocks of one chain, first block first.
    """

    @abstractmethod
    def inserted(self, run: Sequence[BlockHash], retention: Retention = DEFAULT_RETENTION) -> None:
        """These blocks are in the tier from now on; none of them was before."""

    @abstractmethod
    def accessed(self, run: Sequence[BlockHash]) -> None:
        """These blocks, all of them in the tier, were asked for."""

    @abstractmethod
    def removed(self, block_hash: BlockHash) -> None:
        """This block has left the tier for another reason than `evict`."""

    @abstractmethod
    def evict(self, num_blocks: int, try_evict: Callable[[BlockHash], bool]) -> int:
        """Offer blocks to `try_evict`, best victim first, until it took `num_blocks`; how many.

        `try_evict` drops the block and returns True, or False if it may not go now (leased, or its
        children are still there); it does not call back into the policy. One pass over the blocks
        at most, which ends early after `MAX_REFUSED` refusals (the next call offers others first);
        what was taken is forgotten here.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Blocks that are ranked here."""
