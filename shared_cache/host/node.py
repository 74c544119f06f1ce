"""The host tier that all processes of a node share, as one of them has it.

Bytes are copied to and from the mapped arena by whoever needs them; the owner is asked only who may
do so. What the engine's step needs was asked for before: leases are counted here, and slots for new
blocks are taken from a stock. When the owner is away there are misses and dropped saves, nothing
else; what is leased stays readable, as nobody gives those slots to others.
"""

import logging
import struct
from collections.abc import Sequence

from shared_cache.checksum import block_checksum
from shared_cache.config import HostConfig
from shared_cache.faults import FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.host import protocol as wire
from shared_cache.host.connection import AwayError
from shared_cache.host.folder import open_folder
from shared_cache.host.interface import (
    HostClaim,
    HostLease,
    HostStats,
    HostTier,
    MemoryHook,
    NewRun,
    Place,
    PlacedBlocks,
)
from shared_cache.host.mapping import ExtentWatch, MappedArena
from shared_cache.host.places import ArenaPlaces
from shared_cache.host.protocol import pack_hashes
from shared_cache.host.questions import BlockEvents, OwnerQuestions
from shared_cache.host.requests import NO_LEASE, REQUEST_TIMEOUT_S, OwnerRequests
from shared_cache.host.session import OwnerSession, SessionTerms
from shared_cache.host.terms import StoreAdmission

logger = logging.getLogger(__name__)

NO_CLAIM = HostClaim(NO_LEASE, ())


def open_node_tier(
    config: HostConfig,
    namespace_fingerprint: str,
    block_bytes: int,
    admission: StoreAdmission = "always",
) -> "NodeHostTier":
    """The node's host tier for one namespace; its owner is started if `config` allows.

    Raises `ConfigError` when there is no owner, or it cannot serve such blocks.
    """
    faults = FaultLog(logger)
    terms = SessionTerms(open_folder(config), config, namespace_fingerprint, block_bytes, admission)
    session = OwnerSession(terms, ExtentWatch(faults), faults)
    try:
        session.open()
    except BaseException:
        session.close()
        raise
    requests = OwnerRequests(session, faults, verify=config.verify_every_load)
    places = ArenaPlaces(session, terms.paths, block_bytes)
    return NodeHostTier(session, requests, places, faults)


class NodeHostTier(HostTier):
    """One process's view of the arena that its node shares; made by `open_node_tier`."""

    def __init__(
        self,
        session: OwnerSession,
        requests: OwnerRequests,
        places: ArenaPlaces,
        faults: FaultLog,
    ) -> None:
        arena = session.arenas[0]
        self._session = session
        self._requests = requests
        self._places = places
        self._faults = faults
        self._num_slots = arena.num_slots
        self._block_bytes = arena.block_bytes
        self._questions = OwnerQuestions(session, requests)

    @property
    def num_slots(self) -> int:
        """See `HostTier.num_slots`."""
        return self._num_slots

    @property
    def block_bytes(self) -> int:
        """See `HostTier.block_bytes`."""
        return self._block_bytes

    @property
    def num_faults(self) -> int:
        """Requests that failed or were not answered in time."""
        return self._faults.num_faults

    def lease(self, hashes: Sequence[BlockHash], first: int = 0) -> HostLease:
        """See `HostTier.lease`."""
        requests, link = self._requests, self._session.link
        granted = requests.ask(link, wire.Lease(0, pack_hashes(hashes), first), wire.Granted)
        wanted = hashes[first:]
        return requests.verified(link, wanted, requests.take(link, wanted, granted))

    def lease_held(self, hashes: Sequence[BlockHash]) -> HostLease:
        """See `HostTier.lease_held`."""
        with self._session.lock:
            return HostLease(*self._session.holdings.lease_again(hashes))

    def release(self, lease: HostLease) -> None:
        """See `HostTier.release`."""
        session = self._session
        with session.lock:
            session.tell_ended(*session.holdings.release(lease.lease_id))

    def claim(self, hashes: Sequence[BlockHash], wait_s: float = 0.0) -> HostClaim:
        """See `HostTier.claim`."""
        session, requests, link = self._session, self._requests, self._session.link
        request = wire.Claim(0, pack_hashes(hashes), wait_s)
        claimed = requests.ask(link, request, wire.Claimed, REQUEST_TIMEOUT_S + wait_s)
        arena = requests.arena_of(link)
        if claimed is None or arena is None:
            return NO_CLAIM
        slots = arena.numbered(claimed.reserved)
        session.extents.show(arena, slots)
        with session.lock:
            if session.link is not link:
                return NO_CLAIM
            session.holdings.reserve(slots)
        granted = wire.Granted(0, claimed.slots, claimed.to_store, claimed.num_from_peers)
        lease = requests.verified(link, hashes, requests.take(link, hashes, granted))
        if len(lease.slots) == len(claimed.slots):
            return HostClaim(lease, slots, claimed.is_coming)
        self.cancel(slots)  # they are for blocks behind one that is damaged or was lost just now
        return HostClaim(lease, ())

    def reserve(self, num_slots: int) -> tuple[int, ...]:
        """See `HostTier.reserve`."""
        session = self._session
        with session.lock:
            slots = session.stock.take(num_slots)
            session.holdings.reserve(slots)
            is_low = session.stock.is_low
        if is_low and session.link is not None:
            session.link.wake()
        return slots

    @property
    def num_reserved_ahead(self) -> int | None:
        """See `HostTier.num_reserved_ahead`."""
        with self._session.lock:
            return len(self._session.stock)

    def reserve_more_ahead(self) -> None:
        """See `HostTier.reserve_more_ahead`."""
        with self._session.lock:
            self._session.stock.grow()
            is_low = self._session.stock.is_low
        if is_low and self._session.link is not None:
            self._session.link.wake()

    def commit(self, slots: Sequence[int], run: NewRun) -> HostLease:
        """See `HostTier.commit`."""
        session = self._session
        if len(slots) != len(run.hashes) or len(run.checksums) not in (0, len(slots)):
            raise ValueError(
                f"{len(slots)} slots, {len(run.hashes)} hashes, {len(run.checksums)} checksums"
            )
        with session.lock:
            session.holdings.check_reserved(slots)
        checksums = run.checksums or [
            block_checksum(block_hash, self.buffer(slot))
            for block_hash, slot in zip(run.hashes, slots, strict=True)
        ]
        with session.lock:
            link, arena = session.link, session.arenas[0]
            counted = session.holdings.end_reservation(slots)
        if not slots:
            return NO_LEASE
        try:
            if len(counted) < len(slots):
                raise AwayError  # the owner that these slots are from has gone
            request = _commit_request([slot - arena.base for slot in slots], run, checksums)
            granted = self._requests.ask_now(link, request, wire.Granted)
        except AwayError:
            with session.lock:
                if session.link is link and session.arenas[0] is arena:
                    session.tell_ended([], counted)
            return NO_LEASE
        return self._requests.take(link, run.hashes, granted)

    def cancel(self, slots: Sequence[int]) -> None:
        """See `HostTier.cancel`; raises `ValueError` for slots that are not reserved."""
        session = self._session
        with session.lock:
            session.tell_ended([], session.holdings.end_reservation(slots))

    def stored(self, hashes: Sequence[BlockHash], is_stored: bool) -> None:
        """See `HostTier.stored`."""
        packed, link = pack_hashes(hashes), self._session.link
        if link is not None and packed:
            link.tell(wire.Notice(stored=packed) if is_stored else wire.Notice(not_stored=packed))

    def in_use(self, hashes: Sequence[BlockHash]) -> frozenset[BlockHash]:
        """See `HostTier.in_use`."""
        return self._questions.in_use(hashes)

    def pin(self, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """See `HostTier.pin`."""
        return self._questions.pin(hashes, ttl_s)

    def drop(self, hashes: Sequence[BlockHash]) -> int:
        """See `HostTier.drop`."""
        return self._questions.drop(hashes)

    def buffer(self, slot: int) -> memoryview:
        """See `HostTier.buffer`."""
        return self._arena_with(slot).buffer(slot)

    def place(self, slots: Sequence[int]) -> Place:
        """See `HostTier.place`."""
        arena = self._arena_with(slots[0]) if slots else self._session.arenas[0]
        return self._places.place(arena, slots)

    def blocks_at(self, place: Place) -> PlacedBlocks:
        """See `HostTier.blocks_at`."""
        return self._places.blocks(place)

    def checksum(self, slot: int) -> int:
        """See `HostTier.checksum`."""
        return self._arena_with(slot).checksum(slot)

    def stats(self) -> HostStats:
        """See `HostTier.stats`; while the owner is away, what it said last."""
        return self._questions.stats()

    def events(self, since: int = 0) -> BlockEvents | None:
        """What happened to this namespace's blocks from event `since` on; None: owner away."""
        return self._questions.events(since)

    def show_memory(self, hook: MemoryHook) -> None:
        """See `HostTier.show_memory`; extent by extent, as they come into use, or all now."""
        self._session.extents.show_to(hook, self._session.arenas)
        if self._session.is_populated:
            self._session.extents.populate(self._session.arenas[0])

    def close(self) -> None:
        """See `HostTier.close`."""
        self._session.close()

    def _arena_with(self, slot: int) -> MappedArena:
        arenas = self._session.arenas
        first = arenas[0]
        if first.base <= slot < first.end:
            return first
        return next((arena for arena in arenas if arena.base <= slot < arena.end), first)


def _commit_request(slots: list[int], run: NewRun, checksums: Sequence[int]) -> wire.Commit:
    return wire.Commit(
        0,
        slots,
        run.parent,
        pack_hashes(run.hashes),
        struct.pack(f"<{len(checksums)}Q", *checksums),
        run.tenant,
        run.is_stored,
        run.retention.priority,
        run.retention.ttl_s,
    )
