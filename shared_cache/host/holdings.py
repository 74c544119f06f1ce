"""What one process has of the node's arena: blocks it leased, slots it reserved, and its stock.

The engine's step may not ask the owner for anything. So what was granted is counted here: a block
that is leased five times in this process is leased once or twice at the owner, and ends there when
the last of them ends. And after a restart of the owner this is the only place that knows.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from itertools import count

from shared_cache.hashing import BlockHash

GROWN_FOR_S = 10.0
"""For so long a stock that ran short stays larger."""

REPORT_S = 1.0
"""So often the owner is asked how large the stock may be."""

SHORT_PAUSE_S = 0.1
"""So long a stock does not ask again after it got less than it wanted."""


class _Ending(Enum):
    """What the owner is told when the last lease of a block ends."""

    RELEASE = "its leases end"
    CANCEL = "its slot, which holds no block any more, was reserved instead"
    NOTHING = "its arena has gone"


class _Held:
    """A block that is leased here `num_leases` times, and at the owner `num_grants` times."""

    __slots__ = ("block_hash", "ending", "num_grants", "num_leases", "slot")

    def __init__(self, block_hash: BlockHash, slot: int) -> None:
        self.block_hash = block_hash
        self.slot = slot
        self.num_grants = 0
        self.num_leases = 0
        self.ending = _Ending.RELEASE


class Holdings:
    """Leases and reserved slots of this process. Not thread-safe; asks nobody, never waits."""

    def __init__(self) -> None:
        self._held: dict[BlockHash, _Held] = {}
        self._leases: dict[int, list[_Held]] = {}
        self._lease_ids = count(1)
        self._reserved: dict[int, bool] = {}
        self._instead: dict[int, _Held] = {}

    def grant(self, hashes: Sequence[BlockHash], slots: Sequence[int]) -> int:
        """The number of a new lease on blocks that the owner has just leased to us once more."""
        entries = []
        for block_hash, slot in zip(hashes, slots, strict=True):
            entry = self._held.get(block_hash)
            if entry is None:
                entry = self._held[block_hash] = _Held(block_hash, slot)
            entry.num_grants += 1
            entry.num_leases += 1
            entries.append(entry)
        return self._add_lease(entries)

    def lease_again(self, hashes: Sequence[BlockHash]) -> tuple[int, tuple[int, ...]]:
        """The number and slots of a new lease on the leading blocks that are leased here now."""
        entries = []
        find = self._held.get
        for block_hash in hashes:
            entry = find(block_hash)
            if entry is None:
                break
            entry.num_leases += 1
            entries.append(entry)
        return self._add_lease(entries), tuple(entry.slot for entry in entries)

    def release(self, lease_id: int) -> tuple[list[int], list[int]]:
        """End a lease: the slots to release at the owner (once per grant), and those to cancel.

        Nothing for a lease that has ended before.
        """
        released: list[int] = []
        cancelled: list[int] = []
        for entry in self._leases.pop(lease_id, ()):
            entry.num_leases -= 1
            if entry.num_leases:
                continue
            if entry.ending is _Ending.RELEASE:
                del self._held[entry.block_hash]
                released += [entry.slot] * entry.num_grants
            elif entry.ending is _Ending.CANCEL:
                del self._instead[entry.slot]
                cancelled.append(entry.slot)
        return released, cancelled

    def reserve(self, slots: Iterable[int]) -> None:
        """These slots are being written by this process from now on."""
        self._reserved.update(dict.fromkeys(slots, True))

    def check_reserved(self, slots: Collection[int]) -> None:
        """Raise `ValueError` unless all `slots` are being written, each named once."""
        for slot in slots:
            if slot not in self._reserved:
                raise ValueError(f"slot {slot} is not reserved")
        if len(set(slots)) != len(slots):
            raise ValueError(f"a slot is named twice: {list(slots)}")

    def end_reservation(self, slots: Collection[int]) -> list[int]:
        """These are not being written any more; those of them that the owner still counts.

        Raises `ValueError`, and changes nothing, for slots that are not reserved.
        """
        self.check_reserved(slots)
        return [slot for slot in slots if self._reserved.pop(slot)]

    def listing(self) -> tuple[list[int], list[int], list[BlockHash]]:
        """The slots leased, those reserved, and the leased blocks' hashes, to be told to an owner.

        From now on each block counts as leased there once.
        """
        for entry in self._held.values():
            entry.num_grants = 1
        reserved = [slot for slot, is_counted in self._reserved.items() if is_counted]
        leased = [entry.slot for entry in self._held.values()]
        return leased, [*reserved, *self._instead], list(self._held)

    def lost(self, slots: Collection[int]) -> list[int]:
        """These listed slots hold no block any more; the owner has reserved them for us instead.

        They stay readable. Returns those whose last lease has ended meanwhile: to be cancelled.
        """
        left = set(slots)
        for entry in [entry for entry in self._held.values() if entry.slot in left]:
            del self._held[entry.block_hash]
            entry.ending = _Ending.CANCEL
            self._instead[entry.slot] = entry
            left.discard(entry.slot)
        return list(left)

    def refused(self, slots: Collection[int]) -> None:
        """These listed slots are not ours at the owner, which wants to hear nothing of them."""
        left = set(slots)
        for entry in [entry for entry in self._held.values() if entry.slot in left]:
            del self._held[entry.block_hash]
            entry.ending = _Ending.NOTHING
        for slot in left:
            if slot in self._reserved:
                self._reserved[slot] = False
            entry_instead = self._instead.pop(slot, None)
            if entry_instead is not None:
                entry_instead.ending = _Ending.NOTHING

    def arena_has_gone(self) -> None:
        """Another arena took the place of ours: the owner knows nothing of what we have."""
        for entry in (*self._held.values(), *self._instead.values()):
            entry.ending = _Ending.NOTHING
        self._held.clear()
        self._instead.clear()
        self._reserved = dict.fromkeys(self._reserved, False)

    def uses(self, first: int, end: int) -> bool:
        """Whether any slot from `first` up to `end` is leased or being written here."""
        leased = (entry.slot for entries in self._leases.values() for entry in entries)
        return any(first <= slot < end for slots in (self._reserved, leased) for slot in slots)

    def _add_lease(self, entries: list[_Held]) -> int:
        lease_id = next(self._lease_ids)
        if entries:
            self._leases[lease_id] = entries
        return lease_id


class Stock:
    """Slots that were reserved ahead, so that a save in the step takes them without asking.

    Not thread-safe. Grows for a while when more was wanted than there was.
    """

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        """Empty; is to have `size` slots once `limit` says that there is room for them."""
        self._wanted_size = size
        self._usual_size = self._size = 0
        self._max_size = 0
        self._clock = clock
        self._grown_until_s = 0.0
        self._is_asked = False
        self._is_to_fill = False
        self._num_asked = 0
        self._next_ask_s = self._next_report_s = float("-inf")
        self._slots: list[int] = []

    def limit(self, max_size: int) -> None:
        """Never have more slots than `max_size`, which is at least one."""
        self._max_size = max(1, max_size)
        self._usual_size = self._size = min(self._wanted_size, self._max_size)

    def allow(self, max_size: int) -> None:
        """As `limit`, but a stock that has grown stays as large as that allows."""
        before = self._size
        self.limit(max_size)
        self._size = max(self._usual_size, min(before, self._max_size))
        self._is_to_fill |= self._size > before

    def take(self, num_slots: int) -> tuple[int, ...]:
        """Up to `num_slots` slots."""
        if num_slots > len(self._slots):
            self.grow()
        start = max(0, len(self._slots) - max(0, num_slots))
        taken = tuple(self._slots[start:])
        del self._slots[start:]
        return taken

    def grow(self) -> None:
        """More is wanted than there is: be larger for a while, and fill up."""
        self._size = min(2 * self._size, self._max_size)
        self._grown_until_s = self._clock() + GROWN_FOR_S
        self._is_to_fill = True

    @property
    def is_low(self) -> bool:
        """Whether `ask` would ask for slots now."""
        enough = self._size if self._is_to_fill else self._size / 2
        is_short = not self._is_asked and len(self._slots) < enough
        return is_short and self._clock() >= self._next_ask_s

    def ask(self) -> int:
        """How many slots to ask the owner for now; 0 if there are enough or some are on the way.

        `add` must follow when it is above 0.
        """
        if not self.is_low:
            return 0
        return self._begin_asking(self._size - len(self._slots))

    def is_to_report(self) -> bool:
        """Whether the owner is to hear of this stock though nothing is wanted; then as `ask`."""
        if self._is_asked or self._clock() < self._next_report_s:
            return False
        self._begin_asking(0)
        return True

    def __len__(self) -> int:
        """Slots that are here."""
        return len(self._slots)

    def add(self, slots: Iterable[int]) -> None:
        """What was asked for has come, perhaps less."""
        self._is_asked = False
        before = len(self._slots)
        self._slots.extend(slots)
        if not self._num_asked:
            return
        self._is_to_fill = len(self._slots) - before < self._num_asked
        if self._is_to_fill:
            self._next_ask_s = self._clock() + SHORT_PAUSE_S

    def surplus(self) -> list[int]:
        """Slots to give back, as the stock has grown and is not used any more."""
        if self._size > self._usual_size and self._clock() > self._grown_until_s:
            self._size = self._usual_size
        extra = self._slots[self._size :]
        del self._slots[self._size :]
        if extra:
            self._next_report_s = float("-inf")  # others wait for them
        return extra

    def clear(self) -> None:
        """Forget all slots, and those on the way."""
        self._is_asked = False
        self._next_ask_s = self._next_report_s = float("-inf")
        self._slots.clear()

    def _begin_asking(self, num_slots: int) -> int:
        self._is_asked = True
        self._num_asked = num_slots
        self._next_report_s = self._clock() + REPORT_S
        return num_slots
