"""What caches tell of the blocks that they got and lost, from their processes to the router. Pure.

Three failures are prevented here. A router that lost a message, or was restarted, would believe in
blocks that are gone: so changes are numbered, and who cannot go on where it stopped gets a snapshot
of everything. A router that is down must not make its senders collect changes without end. And a
block that came and went between two messages is worth none.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from shared_cache.hashing import BlockHash

CacheTier = Literal["device", "host", "shared"]
"""Where blocks are. What is told of `shared` is only what came there: it is not one machine's."""

MAX_KEPT_CHANGES = 1 << 16
"""Changes that can be told again; who is further behind gets a snapshot."""


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """What an engine's own memory got and lost since it was asked last.

    `stored` blocks are on the device now, `offloaded` ones only in host memory that belongs to the
    engine, `removed` ones in neither; named in their requests' own scope, in no order.
    `is_cleared`: forget what was known before.
    """

    stored: tuple[BlockHash, ...] = ()
    offloaded: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    is_cleared: bool = False

    def __bool__(self) -> bool:
        return bool(self.stored or self.offloaded or self.removed or self.is_cleared)


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far somebody has read: the next change is number `next` of the process `epoch`."""

    epoch: str
    next: int


def _no_keys() -> "array[int]":
    return array("Q")


@dataclass(frozen=True, slots=True)
class TierChanges:
    """Changes of one tier of one cache: blocks (`routing_keys`) that came, and that went.

    They are those from number `first` on; go on with `end`. With `is_snapshot`, `stored` is all
    that is there, and what was known before is void.
    """

    tier: CacheTier
    first: int
    end: Cursor
    stored: "array[int]" = field(default_factory=_no_keys)
    removed: "array[int]" = field(default_factory=_no_keys)
    is_snapshot: bool = False

    def continues(self, cursor: Cursor | None) -> bool:
        """Whether nothing is missing between what was read up to `cursor` and this."""
        return self.is_snapshot or cursor == Cursor(self.end.epoch, self.first)


class ChangeLog:
    """What one tier holds, and the last changes by number; not thread-safe.

    `epoch` names the process: a restarted one begins with nothing.
    """

    def __init__(
        self,
        tier: CacheTier,
        epoch: str,
        max_changes: int = MAX_KEPT_CHANGES,
        max_held: int | None = None,
    ) -> None:
        """With `max_held` blocks, a new one makes the one go that came longest ago."""
        self._tier = tier
        self._epoch = epoch
        self._max_changes = max_changes
        self._max_held = max_held
        self._held: OrderedDict[int, None] = OrderedDict()
        self._first = 0
        self._changes: deque[tuple[int, bool]] = deque()

    def change(self, stored: Iterable[int], removed: Iterable[int]) -> None:
        """Note what came and what went."""
        for key in removed:
            if key in self._held:
                del self._held[key]
                self._changes.append((key, False))
        for key in stored:
            if key not in self._held:
                self._held[key] = None
                self._changes.append((key, True))
        while self._max_held is not None and len(self._held) > self._max_held:
            self._changes.append((self._held.popitem(last=False)[0], False))
        while len(self._changes) > self._max_changes:
            self._changes.popleft()
            self._first += 1

    def clear(self) -> None:
        """All that was there is gone, or unknown."""
        self._first += len(self._changes) + 1
        self._changes.clear()
        self._held.clear()

    def since(self, cursor: Cursor | None) -> TierChanges:
        """The changes behind `cursor`; a snapshot if they are not all known any more."""
        end = Cursor(self._epoch, self._first + len(self._changes))
        if (
            cursor is None
            or cursor.epoch != self._epoch
            or not self._first <= cursor.next <= end.next
        ):
            return TierChanges(self._tier, 0, end, array("Q", self._held), is_snapshot=True)
        wanted = islice(self._changes, cursor.next - self._first, None)
        stored, removed = netted(wanted)
        return TierChanges(self._tier, cursor.next, end, stored, removed)


def netted(changes: Iterable[tuple[int, bool]]) -> "tuple[array[int], array[int]]":
    """What came and what went in the end, of changes (key, came) in their order."""
    last = dict(changes)
    came = array("Q", [key for key, is_there in last.items() if is_there])
    return came, array("Q", [key for key, is_there in last.items() if not is_there])
