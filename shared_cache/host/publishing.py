"""Publishing: blocks enter the arena, within the quota of the tenant that pays for them.

Every block enters here, written by a process or found after a restart, so that no way in forgets
the quota, the link to its parent, or that the shared tier may want it.
"""

from collections.abc import Sequence
from functools import partial

from shared_cache.hashing import BlockHash
from shared_cache.host.block_table import BlockTable
from shared_cache.host.blocks import Block, Group, Quota
from shared_cache.host.interface import NewRun
from shared_cache.host.terms import BlockRecord, Clock, IndexRules, Journal


class Publisher:
    """Puts blocks into slots that were taken for them, as the rules say."""

    def __init__(self, rules: IndexRules, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self._make_policy = partial(rules.make_policy, clock)
        self._quotas = {tenant: Quota(limit) for tenant, limit in rules.quotas.items()}
        # A block is granted as it is published, and that counts as its first use.
        self._uses_to_store = {"always": 1, "second_use": 2, "never": 0}[rules.admission]
        self._frozen: list[Block] = []

    def publish(
        self, table: BlockTable, slots: Sequence[int], run: NewRun, bringer: int, turn: int
    ) -> int:
        """Put a run's blocks into their slots; how many leading blocks of it are here then.

        The slots of blocks that were here, and of those beyond the tenant's quota, are free.
        """
        group = self._group_of(table, run.tenant, turn)
        max_new = self._num_allowed(table, group, run)
        new: list[BlockHash] = []
        present: list[BlockHash] = []
        parents = (run.parent, *run.hashes[:-1])
        for block_hash, parent, slot, checksum in zip(
            run.hashes, parents, slots, run.checksums, strict=True
        ):
            if block_hash in table.blocks:
                present.append(block_hash)
                table.free(slot)
            elif len(new) < max_new:
                record = BlockRecord(block_hash, parent, run.tenant, run.is_stored)
                table.insert(self._block(record, slot, group, bringer, turn))
                self._journal.published(slot, table.namespace, record, checksum)
                new.append(block_hash)
            else:
                break
        num_here = len(new) + len(present)
        for slot in slots[num_here:]:
            table.free(slot)
        group.policy.inserted(new, run.retention)
        table.accessed(present)
        if run.is_stored:
            table.stored(present, turn)
        return num_here

    def adopt(self, table: BlockTable, slot: int, record: BlockRecord) -> bool:
        """See `HostIndex.adopt`."""
        if record.block_hash in table.blocks or not table.pool.take_this(slot):
            return False
        group = self._group_of(table, record.tenant, 0)
        block = self._block(record, slot, group, None, 0)
        block.uses_to_store = min(1, block.uses_to_store)
        block.is_frozen = True
        group.num_frozen += 1
        self._frozen.append(block)
        table.insert(block)
        group.policy.inserted((record.block_hash,))
        return True

    def thaw(self) -> None:
        """See `HostIndex.thaw`; quotas may be smaller than they were before the restart."""
        for block in self._frozen:
            block.is_frozen = False
            block.group.num_frozen = 0
        self._frozen.clear()
        for quota in self._quotas.values():
            quota.make_room(0, self._clock())

    def _group_of(self, table: BlockTable, tenant: bytes, turn: int) -> Group:
        return table.group_of(tenant, self._quotas.get(tenant), self._make_policy, turn)

    def _num_allowed(self, table: BlockTable, group: Group, run: NewRun) -> int:
        """How many new blocks of `run` the tenant may have, once its oldest ones made room."""
        quota, blocks, block_bytes = group.quota, table.blocks, table.block_bytes
        num_new = sum(block_hash not in blocks for block_hash in run.hashes)
        if quota is None:
            return num_new
        num_new = min(num_new, quota.limit_bytes // block_bytes)
        spared = [blocks[name] for name in (run.parent, *run.hashes) if name in blocks]
        quota.make_room(num_new * block_bytes, self._clock(), set(spared))
        return min(num_new, (quota.limit_bytes - quota.used_bytes) // block_bytes)

    def _block(
        self, record: BlockRecord, slot: int, group: Group, bringer: int | None, turn: int
    ) -> Block:
        block = Block(record, slot, group, bringer)
        if record.is_stored:
            block.stored_turn = turn
        else:
            block.uses_to_store = self._uses_to_store
        return block
