"""Requests of a process to the owner of the arena, and the leases that come of them.

An answer counts only if the connection that it came over is still the current one: after a new
beginning the owner knows what this process said then, and nothing else. A lease that came too late
is given back at once.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from shared_cache.faults import FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.host import protocol as wire
from shared_cache.host.connection import AwayError, OwnerLink
from shared_cache.host.interface import HostLease
from shared_cache.host.mapping import MappedArena
from shared_cache.host.protocol import pack_hashes
from shared_cache.host.session import OwnerSession
from shared_cache.integrity import num_intact

REQUEST_TIMEOUT_S = 1.0
NO_LEASE = HostLease(0, ())

_Reply = TypeVar("_Reply", bound=wire.Reply)


class OwnerRequests:
    """Asks the owner and takes what it grants. Thread-safe; nothing here is called in the step."""

    def __init__(self, session: OwnerSession, faults: FaultLog, *, verify: bool) -> None:
        """With `verify`, blocks are checked again whenever they are leased."""
        self._session = session
        self._faults = faults
        self._verify = verify

    def ask(
        self,
        link: OwnerLink | None,
        request: wire.Request,
        kind: type[_Reply],
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> _Reply | None:
        """The answer over this link; None, counted, if there is none."""
        try:
            return self.ask_now(link, request, kind, timeout_s)
        except AwayError:
            return None

    def ask_now(
        self,
        link: OwnerLink | None,
        request: wire.Request,
        kind: type[_Reply],
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> _Reply | None:
        """As `ask`, but raises `AwayError`, counted, if nothing was even sent."""
        try:
            if link is None:
                raise AwayError
            reply = link.ask(request, timeout_s, lambda late: _undo(link, late))
        except AwayError:
            self._faults.record("the owner of the host tier is away")
            raise
        if isinstance(reply, kind):
            return reply
        self._faults.record(f"the owner of the host tier did not answer in {timeout_s:g} s")
        return None

    def take(
        self, link: OwnerLink | None, hashes: Sequence[BlockHash], granted: wire.Granted | None
    ) -> HostLease:
        """The lease that the owner granted over this link on the leading blocks of `hashes`."""
        session = self._session
        arena = self.arena_of(link)
        if arena is None or granted is None or not granted.slots:
            return NO_LEASE
        slots = arena.numbered(granted.slots)
        session.extents.show(arena, slots)
        with session.lock:
            if session.link is not link:
                return NO_LEASE
            lease_id = session.holdings.grant(hashes[: len(slots)], slots)
        return HostLease(lease_id, slots, tuple(granted.to_store), granted.num_from_peers)

    def arena_of(self, link: OwnerLink | None) -> MappedArena | None:
        """The arena that this link is about; None if it is not the current link any more."""
        with self._session.lock:
            return self._session.arenas[0] if link is self._session.link else None

    def verified(
        self, link: OwnerLink | None, hashes: Sequence[BlockHash], lease: HostLease
    ) -> HostLease:
        """The lease, or, if a block of it must be checked and is damaged, one that ends before it.

        The damaged block is forgotten as soon as nobody else reads it.
        """
        arena = self.arena_of(link)
        if not self._verify or arena is None:
            return lease
        num_good = num_intact(
            hashes[: len(lease.slots)],
            [arena.buffer(slot) for slot in lease.slots],
            [arena.checksum(slot) for slot in lease.slots],
        )
        if num_good == len(lease.slots):
            return lease
        self._faults.record("a block in the host tier is damaged")
        return self._shortened(link, hashes, lease, num_good)

    def _shortened(
        self, link: OwnerLink | None, hashes: Sequence[BlockHash], lease: HostLease, num_good: int
    ) -> HostLease:
        session = self._session
        kept = tuple(position for position in lease.to_store if position < num_good)
        given_up = [hashes[position] for position in lease.to_store if position >= num_good]
        with session.lock:
            lease_id, slots = session.holdings.lease_again(hashes[:num_good])
            session.tell_ended(*session.holdings.release(lease.lease_id))
        if link is not None and given_up:
            link.tell(wire.Notice(not_stored=pack_hashes(given_up)))
        self.ask(link, wire.Drop(0, pack_hashes(hashes[num_good : num_good + 1])), wire.Count)
        return replace(lease, lease_id=lease_id, slots=slots, to_store=kept)


def _undo(link: OwnerLink, late: wire.Reply) -> None:
    """Give back what was granted after nobody waited for it any more."""
    if isinstance(late, wire.Granted):
        link.tell(wire.Notice(released=late.slots))
    elif isinstance(late, wire.Claimed):
        link.tell(wire.Notice(released=late.slots, cancelled=late.reserved))
