"""What the owner of an arena does for an attached client: every request, on the index."""

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass

from shared_cache.hashing import HASH_BYTES, BlockHash
from shared_cache.host import protocol as wire
from shared_cache.host.interface import NewRun, Retention
from shared_cache.host.protocol import pack_hashes, unpack_hashes
from shared_cache.host.record_format import MAX_TENANT_BYTES
from shared_cache.host.roster import ArenaState, Client
from shared_cache.host.stocks import StockShares
from shared_cache.host.terms import Grant, checked_ttl_s

MAX_WAIT_S = 60.0


@dataclass(eq=False, slots=True)
class _ParkedClaim:
    """A claim that waits for the first block behind `grant`; `rest` begins with it."""

    client: Client
    request_id: int
    grant: Grant
    rest: list[BlockHash]
    timer: asyncio.TimerHandle | None = None


class Service:
    """Answers the clients of one arena; used by the owner's event loop alone."""

    def __init__(self, state: ArenaState) -> None:
        self._index = state.index
        self._event_ring = state.events
        self._parked: list[_ParkedClaim] = []
        self._stocks: dict[int, StockShares] = {}
        self._answers: dict[type[wire.Message], Callable[..., wire.Message | None]] = {
            wire.Lease: self._lease,
            wire.Claim: self._claim,
            wire.Reserve: self._reserve,
            wire.Commit: self._commit,
            wire.Pin: self._pin,
            wire.Drop: self._drop,
            wire.GetInUse: self._in_use,
            wire.GetStats: self._stats,
            wire.GetEvents: self._events,
            wire.Notice: self._notice,
        }

    def handle(self, client: Client, message: wire.Message) -> None:
        """Do what one message asks; raises `ValueError` for one that breaks the protocol."""
        answer = self._answers.get(type(message))
        if answer is None:
            raise ValueError(f"{type(message).__name__} is not for an attached client")
        reply = answer(client, message)
        if reply is not None:
            client.send(reply)

    def look_at_parked(self) -> None:
        """Answer the claims whose block has come, or will not come any more."""
        for parked in list(self._parked):
            if parked not in self._parked:
                continue  # its client was cut off when the one before it was answered
            if not self._index.is_coming(parked.client.namespace, parked.rest[0]):
                self._answer_parked(parked)

    def forget(self, client: Client) -> None:
        """Answer nothing more to a client that has gone."""
        for parked in [parked for parked in self._parked if parked.client is client]:
            self._unpark(parked)
        for stocks in self._stocks.values():
            stocks.forget(client)

    def _lease(self, client: Client, message: wire.Lease) -> wire.Granted:
        if message.first < 0:
            raise ValueError(f"a lease cannot begin at block {message.first}")
        hashes = unpack_hashes(message.hashes)
        grant = self._index.lease(client.holder, client.namespace, hashes, message.first)
        return _granted(message.id, grant)

    def _claim(self, client: Client, message: wire.Claim) -> wire.Claimed | None:
        hashes = unpack_hashes(message.hashes)
        claim = self._index.claim(client.holder, client.namespace, hashes)
        if claim.slots or not claim.is_coming or not message.wait_s > 0:
            return _claimed(message.id, claim.grant, claim.slots, claim.is_coming)
        rest = hashes[len(claim.grant.slots) :]
        parked = _ParkedClaim(client, message.id, claim.grant, rest)
        wait_s = min(message.wait_s, MAX_WAIT_S)
        loop = asyncio.get_running_loop()
        parked.timer = loop.call_later(wait_s, self._answer_parked, parked)
        self._parked.append(parked)
        return None

    def _answer_parked(self, parked: _ParkedClaim) -> None:
        self._unpark(parked)
        client, before = parked.client, parked.grant
        claim = self._index.claim(client.holder, client.namespace, parked.rest)
        num_before = len(before.slots)
        grant = Grant(
            before.slots + claim.grant.slots,
            before.to_store + tuple(num_before + position for position in claim.grant.to_store),
            before.num_from_peers + claim.grant.num_from_peers,
        )
        client.send(_claimed(parked.request_id, grant, claim.slots, claim.is_coming))

    def _unpark(self, parked: _ParkedClaim) -> None:
        self._parked.remove(parked)
        if parked.timer is not None:
            parked.timer.cancel()

    def _reserve(self, client: Client, message: wire.Reserve) -> wire.Reserved:
        stocks = self._stocks.setdefault(client.namespace, StockShares())
        stats = self._index.stats(client.namespace)
        num_had = max(0, message.num_had)
        num_slots, share = stocks.ask(client, message.num_slots, num_had, stats)
        slots = self._index.reserve(client.holder, client.namespace, num_slots)
        stocks.granted(client, len(slots))
        return wire.Reserved(message.id, list(slots), share)

    def _commit(self, client: Client, message: wire.Commit) -> wire.Granted:
        if len(message.parent) != HASH_BYTES or len(message.tenant) > MAX_TENANT_BYTES:
            raise ValueError("a parent or tenant of a wrong length")
        num_blocks, left_over = divmod(len(message.checksums), 8)
        if left_over:
            raise ValueError("the last checksum is cut short")
        run = NewRun(
            parent=BlockHash(message.parent),
            hashes=tuple(unpack_hashes(message.hashes)),
            tenant=message.tenant,
            is_stored=message.is_stored,
            checksums=struct.unpack(f"<{num_blocks}Q", message.checksums),
            retention=Retention(message.priority, checked_ttl_s(message.ttl_s)),
        )
        grant = self._index.commit(client.holder, client.namespace, message.slots, run)
        self.look_at_parked()
        return _granted(message.id, grant)

    def _pin(self, client: Client, message: wire.Pin) -> wire.Count:
        hashes = unpack_hashes(message.hashes)
        ttl_s = checked_ttl_s(message.ttl_s) or 0.0
        num_blocks = self._index.pin(client.namespace, hashes, ttl_s)
        return wire.Count(message.id, num_blocks)

    def _drop(self, client: Client, message: wire.Drop) -> wire.Count:
        num_blocks = self._index.drop(client.namespace, unpack_hashes(message.hashes))
        return wire.Count(message.id, num_blocks)

    def _in_use(self, client: Client, message: wire.GetInUse) -> wire.InUse:
        hashes = unpack_hashes(message.hashes)
        return wire.InUse(message.id, self._index.in_use(client.namespace, hashes))

    def _stats(self, client: Client, message: wire.GetStats) -> wire.Stats:
        return wire.Stats(message.id, self._index.stats(client.namespace))

    def _events(self, client: Client, message: wire.GetEvents) -> wire.Events:
        first, end, events = self._event_ring.since(message.since, client.namespace)
        kinds = bytes(kind for kind, _ in events)
        return wire.Events(message.id, first, end, kinds, pack_hashes([h for _, h in events]))

    def _notice(self, client: Client, message: wire.Notice) -> None:
        holder, namespace = client.holder, client.namespace
        if message.released:
            self._index.release(holder, message.released)
        if message.cancelled:
            self._index.cancel(holder, message.cancelled)
            self.look_at_parked()
        if message.stored:
            self._index.stored(holder, namespace, unpack_hashes(message.stored), True)
        if message.not_stored:
            self._index.stored(holder, namespace, unpack_hashes(message.not_stored), False)


def _granted(request_id: int, grant: Grant) -> wire.Granted:
    return wire.Granted(request_id, list(grant.slots), list(grant.to_store), grant.num_from_peers)


def _claimed(
    request_id: int, grant: Grant, reserved: tuple[int, ...], is_coming: bool
) -> wire.Claimed:
    leased = list(grant.slots), list(grant.to_store), grant.num_from_peers
    return wire.Claimed(request_id, *leased, list(reserved), is_coming)
