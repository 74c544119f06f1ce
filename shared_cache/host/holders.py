"""A holder: what one process may read and write in the arena.

All that a process has is kept with it, by slot, so that the end of a process ends exactly that,
and a process that gives back what it never had changes nothing.
"""

from collections.abc import Iterable, Sequence

from shared_cache.hashing import BlockHash
from shared_cache.host.block_table import BlockTable
from shared_cache.host.blocks import NEVER_CHECKED, Block
from shared_cache.host.terms import Grant


class Holder:
    """What one process has leased and reserved.

    `leases` has each leased slot's block, `leased_again` how many leases more than one there are;
    `reserved` the namespace of each slot being written, `claimed` the block that it is for, if any.
    """

    __slots__ = ("claimed", "leased_again", "leases", "number", "reserved", "tables")

    def __init__(self, number: int) -> None:
        self.number = number
        self.tables: set[BlockTable] = set()
        self.leases: dict[int, Block] = {}
        self.leased_again: dict[int, int] = {}
        self.reserved: dict[int, BlockTable] = {}
        self.claimed: dict[int, BlockHash] = {}

    def check_reserved(self, slots: Sequence[int], table: BlockTable | None = None) -> None:
        """Raise `ValueError` unless all `slots` are reserved by this holder, each named once."""
        for slot in slots:
            owner = self.reserved.get(slot)
            if owner is None or (table is not None and owner is not table):
                raise ValueError(f"slot {slot} is not reserved by holder {self.number}")
        if len(set(slots)) != len(slots):
            raise ValueError(f"a slot is named twice: {list(slots)}")

    def end_reservation(self, slot: int) -> None:
        """`slot` is not being written any more, and its claim ends."""
        table = self.reserved.pop(slot)
        claimed = self.claimed.pop(slot, None)
        if claimed is not None:
            table.claims.discard(claimed)

    def grant(self, table: BlockTable, hashes: Sequence[BlockHash], turn: int) -> Grant:
        """Lease the leading blocks that are here, and take over the duty to store them."""
        slots: list[int] = []
        to_store: list[int] = []
        num_from_peers, number = 0, self.number
        find, lease, recheck_turn = table.blocks.get, self.lease, table.recheck_turn
        for block_hash in hashes:
            block = find(block_hash)
            if block is None:
                break
            lease(block)
            block.last_use = turn
            if block.bringer != number and block.bringer is not None:
                num_from_peers += 1
            if block.stored_turn < recheck_turn:
                block.stored_turn = NEVER_CHECKED
                block.uses_to_store = 1
            if block.uses_to_store:
                block.uses_to_store -= 1
                if not block.uses_to_store:
                    table.storing[block_hash] = number
                    to_store.append(len(slots))
            slots.append(block.slot)
        table.num_from_peers += num_from_peers
        return Grant(tuple(slots), tuple(to_store), num_from_peers)

    def lease(self, block: Block) -> None:
        """Lease a block once more."""
        slot = block.slot
        if slot in self.leases:
            self.leased_again[slot] = self.leased_again.get(slot, 0) + 1
            return
        self.leases[slot] = block
        if not block.num_holders:
            block.group.num_leased += 1
        block.num_holders += 1

    def release(self, slots: Iterable[int]) -> None:
        """End one lease on each of these slots that this holder has leased."""
        leases, again = self.leases, self.leased_again
        for slot in slots:
            block = leases.get(slot)
            if block is None:
                continue
            if slot in again:
                again[slot] -= 1
                if not again[slot]:
                    del again[slot]
                continue
            del leases[slot]
            block.num_holders -= 1
            if not block.num_holders:
                block.group.num_leased -= 1

    def release_all(self) -> None:
        """End all leases."""
        self.leased_again.clear()
        self.release(list(self.leases))
