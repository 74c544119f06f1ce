"""What a process asks the owner of the arena besides leases and slots.

None of this is asked for a request: administration, upkeep and statistics want it, and get an empty
answer while the owner is away. The owner serves others too, so long questions are asked in parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shared_cache.hashing import BlockHash
from shared_cache.host import protocol as wire
from shared_cache.host.interface import HostStats
from shared_cache.host.journal import EventKind
from shared_cache.host.protocol import pack_hashes, unpack_hashes
from shared_cache.host.requests import OwnerRequests
from shared_cache.host.session import OwnerSession
from shared_cache.host.terms import checked_ttl_s

HASHES_ASKED_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """What happened to blocks, from event number `first` on; go on with `next`.

    A `first` that is not the number asked for means that events between are forgotten.
    """

    first: int
    next: int
    events: tuple[tuple[EventKind, BlockHash], ...]


class OwnerQuestions:
    """Asks over the link that is open now; thread-safe. See `HostTier` for each of them."""

    def __init__(self, session: OwnerSession, requests: OwnerRequests) -> None:
        arena = session.arenas[0]
        self._session = session
        self._requests = requests
        empty = HostStats(arena.num_slots, arena.num_slots, 0, 0, 0, 0, arena.block_bytes)
        self._last_stats = replace(empty, is_connected=False)

    def in_use(self, hashes: Sequence[BlockHash]) -> frozenset[BlockHash]:
        """Those of `hashes` that any process uses."""
        found: list[BlockHash] = []
        for start in range(0, len(hashes), HASHES_ASKED_AT_ONCE):
            asked = hashes[start : start + HASHES_ASKED_AT_ONCE]
            request = wire.GetInUse(0, pack_hashes(asked))
            reply = self._requests.ask(self._session.link, request, wire.InUse)
            if reply is None:
                break
            found.extend(asked[place] for place in reply.positions if 0 <= place < len(asked))
        return frozenset(found)

    def pin(self, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """Keep blocks for so long; how many there are."""
        request = wire.Pin(0, pack_hashes(hashes), checked_ttl_s(ttl_s) or 0.0)
        pinned = self._requests.ask(self._session.link, request, wire.Count)
        return pinned.num_blocks if pinned is not None else 0

    def drop(self, hashes: Sequence[BlockHash]) -> int:
        """Forget blocks; how many there were."""
        request = wire.Drop(0, pack_hashes(hashes))
        dropped = self._requests.ask(self._session.link, request, wire.Count)
        return dropped.num_blocks if dropped is not None else 0

    def stats(self) -> HostStats:
        """The owner's figures; while it is away, what it said last."""
        reply = self._requests.ask(self._session.link, wire.GetStats(0), wire.Stats)
        if reply is None:
            return replace(self._last_stats, is_connected=False)
        self._last_stats = reply.stats
        return reply.stats

    def events(self, since: int) -> BlockEvents | None:
        """What happened to this namespace's blocks from event `since` on; None: owner away."""
        reply = self._requests.ask(self._session.link, wire.GetEvents(0, since), wire.Events)
        if reply is None:
            return None
        kinds = [EventKind(kind) for kind in reply.kinds]
        events = tuple(zip(kinds, unpack_hashes(reply.hashes), strict=True))
        return BlockEvents(reply.first, reply.next, events)
