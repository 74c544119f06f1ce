"""The device tier's bookkeeping: which slot of the pool holds which block, and who uses it.

Prevents the two faults that give wrong tokens without any error: handing out a slot that a running
request still reads, and offering a block for reuse whose bytes are not its own any more. Pure:
numbers in, numbers out; the bytes are elsewhere.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

from actors.cache_changes import MAX_KEPT_CHANGES, CacheChanges
from shared_cache.hashing import BlockHash


class SlotPool:
    """Slots with reference counts; a block whose slot nobody uses stays until room is needed.

    A slot is free, referenced (by one or more requests), or idle: unreferenced, but published under
    a hash and ready to be acquired again. Idle slots are evicted least recently released first.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_allocated = 0
        self.num_acquired = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._refs = [0] * num_slots
        self._slot_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._changes: deque[tuple[BlockHash, bool]] = deque()  # another thread takes them
        self._has_lost_changes = False

    @property
    def num_available(self) -> int:
        """Slots that `allocate` can give now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_referenced(self) -> int:
        """Slots that requests use now."""
        return self.num_slots - self.num_available

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are on the device; changes nothing."""
        return next((i for i, h in enumerate(hashes) if h not in self._slot_of), len(hashes))

    def num_idle(self, hashes: Sequence[BlockHash]) -> int:
        """How many of these matched blocks lie in idle slots, so that acquiring them takes room."""
        return sum(self._slot_of[block_hash] in self._idle for block_hash in hashes)

    def acquire(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The slots of these matched blocks, each referenced once more."""
        slots = [self._slot_of[block_hash] for block_hash in hashes]
        for slot in slots:
            self._refs[slot] += 1
            self._idle.pop(slot, None)
        self.num_acquired += len(slots)
        return slots

    def allocate(self, num_slots: int) -> list[int]:
        """Take slots to write into, evicting idle blocks if need be; each referenced once.

        Raises `ValueError`, and takes nothing, when fewer are available.
        """
        if num_slots > self.num_available:
            raise ValueError(f"{num_slots} slots asked for, {self.num_available} available")
        slots = [self._free.pop() if self._free else self._evict() for _ in range(num_slots)]
        for slot in slots:
            self._refs[slot] = 1
        self.num_allocated += num_slots
        return slots

    def _evict(self) -> int:
        slot, _ = self._idle.popitem(last=False)
        block_hash = self._hash_of.pop(slot)
        del self._slot_of[block_hash]
        self._note_change(block_hash, False)
        return slot

    def _note_change(self, block_hash: BlockHash, is_here: bool) -> None:
        """Nobody need take the changes; then they must not pile up."""
        if len(self._changes) >= MAX_KEPT_CHANGES:
            self._has_lost_changes = True
            self._changes.clear()
        self._changes.append((block_hash, is_here))

    def take_changes(self) -> CacheChanges:
        """What can be matched since the last call, and what no more; from any one thread."""
        if self._has_lost_changes:
            self._has_lost_changes = False
            self._changes.clear()  # before looking: what changes meanwhile is told twice
            return CacheChanges(stored=tuple(self._slot_of), is_cleared=True)
        last: dict[BlockHash, bool] = {}
        for _ in range(len(self._changes)):
            try:
                block_hash, is_here = self._changes.popleft()
            except IndexError:  # they were too many: all is told next time
                break
            last[block_hash] = is_here
        stored = tuple(name for name, is_here in last.items() if is_here)
        return CacheChanges(stored, removed=tuple(last.keys() - set(stored)))

    def publish(self, slot: int, block_hash: BlockHash) -> None:
        """Offer a referenced slot's complete block for reuse; the first slot of a hash keeps it."""
        if not self._refs[slot]:
            raise ValueError(f"slot {slot} is not in use, its content is undefined")
        if block_hash not in self._slot_of and slot not in self._hash_of:
            self._slot_of[block_hash] = slot
            self._hash_of[slot] = block_hash
            self._note_change(block_hash, True)

    def release(self, slots: Sequence[int]) -> None:
        """End one reference to each; the last of `slots` is evicted first.

        A chain is released whole and first block first, so its root outlives its leaves: without
        the root, the leaves could not be matched any more.
        """
        for slot in reversed(slots):
            if not self._refs[slot]:
                raise ValueError(f"slot {slot} is released more often than acquired")
            self._refs[slot] -= 1
            if self._refs[slot]:
                continue
            if slot in self._hash_of:
                self._idle[slot] = None
            else:
                self._free.append(slot)
