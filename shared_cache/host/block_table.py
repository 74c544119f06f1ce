"""One namespace's blocks: found by name, linked to their parents, brought and dropped.

A block whose parent is gone can never be matched again, so a block goes only when none of its
children is here. The one exception is an extent that another namespace needs: all its blocks go.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby, takewhile

from shared_cache.eviction import EvictionPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.blocks import NEVER_CHECKED, Block, Group, Quota
from shared_cache.host.extents import Extent, SlotPool
from shared_cache.host.terms import Journal


class BlockTable:
    """The blocks of one namespace, and what is on its way in and out.

    `claims` are being brought by somebody, `storing` has the holder that is writing each block to
    the shared tier.
    """

    def __init__(self, namespace: int, block_bytes: int, pool: SlotPool, journal: Journal) -> None:
        self.namespace = namespace
        self.block_bytes = block_bytes
        self.pool = pool
        self.blocks: dict[BlockHash, Block] = {}
        self.claims: set[BlockHash] = set()
        self.storing: dict[BlockHash, int] = {}
        self.num_attached = 0
        self.num_from_peers = 0
        self.recheck_turn = -1
        """Blocks stored before this turn are looked up in the shared tier again when used."""
        self.next_search_s = float("-inf")
        """When `shares` looks again for an extent that others could give."""
        self._groups: dict[bytes | None, Group] = {}
        self._num_orphans_of: dict[BlockHash, int] = {}
        self._journal = journal

    @property
    def groups(self) -> Collection[Group]:
        """All groups that have had a block."""
        return self._groups.values()

    @property
    def num_leased(self) -> int:
        """Blocks that are leased by anybody."""
        return sum(group.num_leased for group in self._groups.values())

    @property
    def num_evicted(self) -> int:
        """Blocks that had to make room; only grows."""
        return sum(group.num_evicted for group in self._groups.values())

    def group_of(
        self,
        tenant: bytes,
        quota: Quota | None,
        make_policy: Callable[[], EvictionPolicy],
        turn: int,
    ) -> Group:
        """The group for blocks of `tenant`, new or known; tenants without a quota share one."""
        key = None if quota is None else tenant
        group = self._groups.get(key)
        if group is None:
            group = Group(make_policy(), self.blocks, self._remove, self.block_bytes, quota, turn)
            self._groups[key] = group
        return group

    def num_unclaimed(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are neither here nor being brought."""
        return sum(
            1 for _ in takewhile(lambda h: h not in self.blocks and h not in self.claims, hashes)
        )

    def touch(self, hashes: Sequence[BlockHash], turn: int) -> list[BlockHash]:
        """Count a use of those that are here, without a lease; which those are.

        None is offered for storing: that comes with a lease.
        """
        present = []
        for block_hash in hashes:
            block = self.blocks.get(block_hash)
            if block is not None:
                block.last_use = turn
                present.append(block_hash)
        return present

    def accessed(self, run: Sequence[BlockHash]) -> None:
        """Tell the policies that these blocks, all here, were asked for."""
        if not run:
            return
        if len(self._groups) == 1:
            next(iter(self._groups.values())).policy.accessed(run)
            return
        for group, part in groupby(run, lambda block_hash: self.blocks[block_hash].group):
            group.policy.accessed(list(part))

    def insert(self, block: Block) -> None:
        """A block is here from now on, in a slot that was taken; its policy is not told yet."""
        block.num_children = self._num_orphans_of.pop(block.block_hash, 0)
        parent = self.blocks.get(block.parent)
        if parent is None:
            self._num_orphans_of[block.parent] = self._num_orphans_of.get(block.parent, 0) + 1
        else:
            parent.num_children += 1
            block.parent = parent.block_hash  # one copy of the bytes
        self.blocks[block.block_hash] = block
        self.pool.extent_of(block.slot).put(block.slot, block)
        if block.group.quota is not None:
            block.group.quota.used_bytes += self.block_bytes

    def stored(self, hashes: Sequence[BlockHash], turn: int) -> None:
        """The shared tier has these blocks in this turn; those that are not here are ignored."""
        for block_hash in hashes:
            block = self.blocks.get(block_hash)
            if block is None:
                continue
            block.uses_to_store = 0
            block.stored_turn = turn
            self.storing.pop(block_hash, None)
            if not block.is_stored:
                block.is_stored = True
                self._journal.stored(block.slot)

    def not_stored(self, hashes: Sequence[BlockHash], *, is_wanted: bool) -> None:
        """The shared tier has lost these blocks; if `is_wanted`, the next use offers them again.

        Their records go on to say that they are stored: found after a crash of the owner, they are
        looked up again when they are used.
        """
        for block_hash in hashes:
            block = self.blocks.get(block_hash)
            if block is not None and block.is_stored and block_hash not in self.storing:
                block.is_stored = False
                block.stored_turn = NEVER_CHECKED
                block.uses_to_store = int(is_wanted)

    def in_use(self, hashes: Sequence[BlockHash], unused_turn: int) -> list[int]:
        """The positions of those that are leased, or were asked for after `unused_turn`."""
        found = []
        for position, block_hash in enumerate(hashes):
            block = self.blocks.get(block_hash)
            if block is not None and (block.num_holders or block.last_use > unused_turn):
                found.append(position)
        return found

    def give_up_storing(self, holder: int, hashes: Sequence[BlockHash] | None = None) -> None:
        """What `holder` was to store of `hashes` (None: of all) is offered again when used."""
        for block_hash in list(self.storing) if hashes is None else hashes:
            if self.storing.get(block_hash) == holder:
                del self.storing[block_hash]
                self.blocks[block_hash].uses_to_store = 1

    def pin(self, hashes: Sequence[BlockHash], until_s: float) -> int:
        """Keep the leading blocks that are here until `until_s` at least; how many those are."""
        here = list(takewhile(self.blocks.__contains__, hashes))
        for block_hash in here:
            block = self.blocks[block_hash]
            block.pinned_until_s = max(block.pinned_until_s, until_s)
        return len(here)

    def unpin(self, hashes: Sequence[BlockHash]) -> int:
        """End the pins of the leading blocks that are here; how many those were."""
        here = list(takewhile(self.blocks.__contains__, hashes))
        for block_hash in here:
            self.blocks[block_hash].pinned_until_s = float("-inf")
        return len(here)

    def drop_idle(self, hashes: Sequence[BlockHash]) -> int:
        """Drop those of these blocks that nobody can be reading; how many those were."""
        here = [self.blocks[name] for name in dict.fromkeys(hashes) if name in self.blocks]
        idle = [block for block in here if not block.num_holders and not block.is_frozen]
        for block in idle:
            self.drop(block)
        return len(idle)

    def drop(self, block: Block) -> None:
        """A block is not here any more, and its policy is told."""
        block.group.policy.removed(block.block_hash)
        self._remove(block)

    def clear(self, extent: Extent) -> None:
        """Evict all blocks of an extent; all of them must be free to go."""
        for block in extent.blocks:
            if block is not None:
                self.drop(block)
                block.group.num_evicted += 1

    def free(self, slot: int) -> None:
        """A slot that was taken and holds no block is free again."""
        self._journal.freed(slot)
        self.pool.give_back(slot)

    def _remove(self, block: Block) -> None:
        del self.blocks[block.block_hash]
        self.storing.pop(block.block_hash, None)
        if block.num_children:
            self._num_orphans_of[block.block_hash] = block.num_children
        parent = self.blocks.get(block.parent)
        if parent is not None:
            parent.num_children -= 1
        elif self._num_orphans_of[block.parent] == 1:
            del self._num_orphans_of[block.parent]
        else:
            self._num_orphans_of[block.parent] -= 1
        if block.group.quota is not None:
            block.group.quota.used_bytes -= self.block_bytes
        self.pool.extent_of(block.slot).put(block.slot, None)
        self.free(block.slot)
