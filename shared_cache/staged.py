"""What is staged of one prompt: verified in host memory, and leased until it is released.

A lease says which slots; a staged prefix says which blocks of a prompt they hold, in how many
shards, and which of them the request had to wait for. Pure.
"""

from dataclasses import dataclass

from shared_cache.fates import Fate
from shared_cache.hashing import DEFAULT_SCOPE, ReuseScope
from shared_cache.host.interface import HostLease
from shared_cache.shortfalls import Shortfall


@dataclass(frozen=True, slots=True)
class StagedPrefix:
    """Consecutive blocks of a request, from block `first` on, verified in host memory and leased.

    `fetched` holds the indices, counted from block 0, of the blocks that this request waited for
    from the tiers; the others were in host memory already. Of a cache in shards, `shards` says what
    each of them has, and `lease` is empty. `missed` says why block `end` is not here, where tiers
    were asked for it, and `fate` what had become of it here before.
    """

    lease: HostLease
    fetched: frozenset[int] = frozenset()
    first: int = 0
    scope: ReuseScope = DEFAULT_SCOPE
    shards: tuple["StagedPrefix", ...] = ()
    missed: Shortfall | None = None
    fate: Fate | None = None

    @property
    def num_blocks(self) -> int:
        """How many blocks are staged, in every shard."""
        if self.shards:
            return min(len(shard.lease.slots) for shard in self.shards)
        return len(self.lease.slots)

    @property
    def end(self) -> int:
        """The index behind the last staged block."""
        return self.first + self.num_blocks
