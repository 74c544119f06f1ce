"""Extents and slots: which part of the arena belongs to which namespace, and which slots are free.

Namespaces have blocks of different sizes. Cut once for all of them, an arena would waste the
difference in every slot; cut for the first one, it would lock out the next. So memory is handed out
in extents, each cut into slots of one size; what is wasted is less than one slot in each extent.
"""

from shared_cache.errors import ConfigError
from shared_cache.host.blocks import Block
from shared_cache.host.terms import Clock, Journal

SLOT_ALIGNMENT_BYTES = 4096
"""Slots begin at multiples of this, so that stores may read into them past the system's cache."""

REFUSED_FOR_S = 60.0
"""How long no memory is asked of a system that had none."""


def slot_bytes_of(block_bytes: int) -> int:
    """What a block takes in the arena."""
    return -(-block_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES


class Extent:
    """A part of the arena, cut into slots: which of them are free, and what lies in the others."""

    __slots__ = ("_first_slot", "_next_new", "_returned", "_stride", "blocks", "num_used", "number")

    def __init__(self, number: int, first_slot: int, num_slots: int, stride: int) -> None:
        self.number = number
        self.num_used = 0
        self.blocks: list[Block | None] = [None] * num_slots
        self._first_slot = first_slot
        self._stride = stride
        self._next_new = 0
        self._returned: dict[int, None] = {}  # used as a set that gives back what came last

    @property
    def num_slots(self) -> int:
        """Slots in any state."""
        return len(self.blocks)

    @property
    def num_free(self) -> int:
        """Slots that are neither reserved nor used."""
        return len(self.blocks) - self._next_new + len(self._returned)

    @property
    def num_reserved(self) -> int:
        """Slots that are being written."""
        return len(self.blocks) - self.num_free - self.num_used

    def take(self) -> int:
        """One free slot; there must be one."""
        if self._returned:
            return self._returned.popitem()[0]
        self._next_new += 1
        return self._first_slot + (self._next_new - 1) * self._stride

    def take_this(self, slot: int) -> bool:
        """Take this slot if it is free; raises `ValueError` where no slot begins."""
        offset = slot - self._first_slot
        index = offset // self._stride
        if offset % self._stride or not 0 <= index < len(self.blocks):
            raise ValueError(f"no slot of extent {self.number} begins at {slot}")
        while self._next_new <= index:
            self._returned[self._first_slot + self._next_new * self._stride] = None
            self._next_new += 1
        if slot not in self._returned:
            return False
        del self._returned[slot]
        return True

    def give_back(self, slot: int) -> None:
        """A slot that was taken is free again."""
        self._returned[slot] = None

    def block_at(self, slot: int) -> Block | None:
        """The block whose slot this is, if any."""
        index, rest = divmod(slot - self._first_slot, self._stride)
        return None if rest or index >= len(self.blocks) else self.blocks[index]

    def put(self, slot: int, block: Block | None) -> None:
        """A taken slot holds this block from now on, or none any more."""
        index = (slot - self._first_slot) // self._stride
        self.num_used += (block is not None) - (self.blocks[index] is not None)
        self.blocks[index] = block


class SlotPool:
    """The slots of one namespace, in all its extents."""

    def __init__(self, slot_bytes: int, extent_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots_per_extent = extent_bytes // slot_bytes
        self.extents: dict[int, Extent] = {}
        self.num_free = 0
        self._open: dict[int, Extent] = {}  # those that may have free slots
        self._extent_units = extent_bytes // SLOT_ALIGNMENT_BYTES

    @property
    def num_slots(self) -> int:
        """Slots in any state."""
        return len(self.extents) * self.slots_per_extent

    def add(self, number: int) -> None:
        """An extent is ours from now on, all its slots free."""
        stride = self.slot_bytes // SLOT_ALIGNMENT_BYTES
        extent = Extent(number, number * self._extent_units, self.slots_per_extent, stride)
        self.extents[number] = self._open[number] = extent
        self.num_free += extent.num_free

    def remove(self, extent: Extent) -> None:
        """An extent, all of its slots free, is ours no more."""
        del self.extents[extent.number]
        del self._open[extent.number]
        self.num_free -= extent.num_free

    def take(self, num_slots: int) -> list[int]:
        """So many free slots, or as many as there are."""
        slots: list[int] = []
        while len(slots) < num_slots and self._open:
            number, extent = next(reversed(self._open.items()))
            wanted = min(num_slots - len(slots), extent.num_free)
            slots += [extent.take() for _ in range(wanted)]
            if not extent.num_free:
                del self._open[number]
        self.num_free -= len(slots)
        return slots

    def take_this(self, slot: int) -> bool:
        """Take this slot if it is free; raises `ValueError` if it is not one of ours."""
        is_taken = self.extent_of(slot).take_this(slot)
        self.num_free -= is_taken
        return is_taken

    def give_back(self, slot: int) -> None:
        """A slot that was taken is free again."""
        extent = self.extent_of(slot)
        extent.give_back(slot)
        self._open[extent.number] = extent
        self.num_free += 1

    def has(self, slot: int) -> bool:
        """Whether a slot lies in one of our extents."""
        return slot // self._extent_units in self.extents

    def block_at(self, slot: int) -> Block | None:
        """The block whose slot this is, if there is one of ours."""
        return self.extent_of(slot).block_at(slot) if self.has(slot) else None

    def extent_of(self, slot: int) -> Extent:
        """The extent in which a slot lies; raises `ValueError` if it is not one of ours."""
        extent = self.extents.get(slot // self._extent_units)
        if extent is None:
            raise ValueError(f"slot {slot} is in no extent of this namespace")
        return extent


class ExtentTable:
    """The extents that are nobody's, and the system's memory behind them."""

    def __init__(self, arena_bytes: int, extent_bytes: int, journal: Journal, clock: Clock) -> None:
        if extent_bytes < 1 or extent_bytes % SLOT_ALIGNMENT_BYTES or arena_bytes < extent_bytes:
            raise ConfigError(
                f"an arena of {arena_bytes} bytes cannot be cut into extents of {extent_bytes} "
                f"bytes (a multiple of {SLOT_ALIGNMENT_BYTES}); raise cache.host.bytes"
            )
        self.extent_bytes = extent_bytes
        self.num_extents = arena_bytes // extent_bytes
        self._journal = journal
        self._clock = clock
        self._returned: dict[int, None] = {}  # have their memory already
        self._untouched: dict[int, None] = dict.fromkeys(range(self.num_extents))
        self._refused_until_s = float("-inf")

    @property
    def num_unassigned(self) -> int:
        """Extents that are nobody's and, as far as we know, can be had."""
        return len(self._returned) + (0 if self._is_refused() else len(self._untouched))

    @property
    def num_obtainable(self) -> int:
        """Extents that are somebody's or can be had."""
        return self.num_extents - (len(self._untouched) if self._is_refused() else 0)

    def assign(self, namespace: int, slot_bytes: int) -> int | None:
        """An extent that was nobody's, cut into slots of `slot_bytes`; None if there is none."""
        source = self._returned if self._returned or self._is_refused() else self._untouched
        number = next(iter(source), None)
        if number is None:
            return None
        del source[number]
        if self._journal.extent_assigned(number, namespace, slot_bytes):
            return number
        self._untouched[number] = None
        self._refused_until_s = self._clock() + REFUSED_FOR_S
        return None

    def give_back(self, number: int, namespace: int) -> None:
        """An extent is nobody's again; it keeps its memory."""
        self._journal.extent_assigned(number, namespace, 0)
        self._returned[number] = None

    def adopt(self, number: int) -> None:
        """After a restart: this extent is somebody's; raises `ValueError` if it was already."""
        if number not in self._untouched:
            raise ValueError(f"extent {number} does not exist or is assigned already")
        del self._untouched[number]

    def _is_refused(self) -> bool:
        return self._clock() < self._refused_until_s
