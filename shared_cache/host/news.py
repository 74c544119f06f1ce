"""What an arena holds, and what it got and lost: for whoever routes requests to its machine."""

from dataclasses import dataclass

from shared_cache.hashing import BlockHash
from shared_cache.host.index import HostIndex
from shared_cache.host.journal import EventKind, EventRing


@dataclass(frozen=True, slots=True)
class ArenaEvents:
    """What happened from event `first` on, in order; go on with `next`.

    A `first` that is not the number asked for means that events between are forgotten.
    """

    first: int
    next: int
    events: tuple[tuple[EventKind, BlockHash], ...]


class ArenaNews:
    """One owner's news, of all namespaces; for its event loop. `epoch` names the owner."""

    def __init__(self, index: HostIndex, events: EventRing) -> None:
        self.epoch = events.epoch
        self._index = index
        self._events = events

    def since(self, number: int) -> ArenaEvents:
        """The events from `number` on."""
        first, end, events = self._events.since(number, None)
        return ArenaEvents(first, end, tuple(events))

    def everything(self) -> tuple[int, list[tuple[BlockHash, bool]]]:
        """The number of the next event, and all blocks with whether the shared tier has them."""
        return self._events.next_number, self._index.blocks()
