"""Fetching: runs of blocks on their way from the shared tier into the host tier.

A burst of requests with one system prompt would read the same blocks once per request. Here every
block on its way belongs to exactly one `Fetch`; whoever needs it too waits for the same one. A
fetch goes in pieces, several at a time, so that a request whose time runs out still gets what has
arrived, in order, and no long prompt keeps the threads from a short one.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from shared_cache.faults import StoreGuard
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier
from shared_cache.store import BlockStore
from shared_cache.threads import IoThreads

BLOCKS_PER_PIECE = 8
"""Read by one store call; a few MB, where local disks and object stores reach their bandwidth."""

CLOSE_TIMEOUT_S = 5.0
"""How long closing waits for store calls that are under way."""


@dataclass(eq=False, slots=True)
class Fetch:
    """One run on its way; the fetcher's lock guards all that changes.

    `before` are the hashes of the same chain before the run: a store that never saw the run finds
    it by the object that it lies in, which may begin earlier. `num_arrived` leading blocks are in
    host memory, leased by this fetch; it holds its leases until it is done and nobody uses it any
    more. `read` are the blocks that the store delivered.
    """

    before: tuple[BlockHash, ...]
    hashes: tuple[BlockHash, ...]
    num_arrived: int = 0
    is_done: bool = False
    num_users: int = 0
    read: set[BlockHash] = field(default_factory=set)
    leases: list[HostLease] = field(default_factory=list)
    num_found: int = 0
    num_submitted: int = 0
    num_running: int = 0
    finished_pieces: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request's interest in the first `num_wanted` blocks of a fetch."""

    fetch: Fetch
    num_wanted: int


class Fetcher:
    """Reads missing blocks into the host tier, each block once however many requests want it.

    Every `join` must be followed by `leave`. Nothing here raises for a fault of the store.
    """

    def __init__(
        self, host: HostTier, store: BlockStore, guard: StoreGuard, num_threads: int
    ) -> None:
        self._host = host
        self._store = store
        self._guard = guard
        self._pieces_at_once = num_threads
        self._threads = IoThreads(num_threads, "kvcommons-fetch")
        self._changed = threading.Condition()
        self._in_flight: dict[BlockHash, tuple[Fetch, int]] = {}
        self._is_closed = False
        self._meter = _BusyMeter()
        self._fetched_blocks = 0

    @property
    def fetched_blocks(self) -> int:
        """Verified blocks that came from the shared tier since the start."""
        return self._fetched_blocks

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was under way; blocks over this is the bandwidth."""
        return self._meter.busy_s

    def join(self, chain: Sequence[BlockHash], start: int) -> list[Ticket]:
        """Have the blocks of `chain` from `start` on fetched, those that are not on their way yet.

        Gives tickets in prefix order; none when the store is better left alone now.
        """
        if not self._guard.usable():
            return []
        with self._changed:
            if self._is_closed:
                return []
            tickets = []
            groups = groupby(chain[start:], key=lambda h: self._in_flight.get(h, (None, 0))[0])
            for known, group in groups:
                hashes = tuple(group)
                fetch = known or self._begin(Fetch(tuple(chain[:start]), hashes))
                fetch.num_users += 1
                tickets.append(Ticket(fetch, self._in_flight[hashes[-1]][1] + 1))
                start += len(hashes)
            return tickets

    def wait(self, tickets: Sequence[Ticket], deadline_s: float) -> bool:
        """Wait until it is decided how much of `tickets` arrives; False when time ran out first.

        `deadline_s` is a time of `time.monotonic`.
        """
        with self._changed:
            for ticket in tickets:
                decided = partial(self._is_decided, ticket)
                if not self._changed.wait_for(decided, max(0.0, deadline_s - time.monotonic())):
                    return False
                if ticket.fetch.num_arrived < ticket.num_wanted:
                    break  # a gap: what lies beyond it is of no use
        return True

    def leave(self, tickets: Sequence[Ticket]) -> set[BlockHash]:
        """Give up interest; the blocks of `tickets` that the store has delivered so far."""
        delivered: set[BlockHash] = set()
        with self._changed:
            for ticket in tickets:
                ticket.fetch.num_users -= 1
                delivered |= ticket.fetch.read
                self._release_unused(ticket.fetch)
        return delivered

    def close(self) -> None:
        """Stop; whoever waits returns at once with what has arrived."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._threads.close(CLOSE_TIMEOUT_S)
        with self._changed:
            for fetch in {id(fetch): fetch for fetch, _ in self._in_flight.values()}.values():
                self._finish(fetch)

    def _begin(self, fetch: Fetch) -> Fetch:
        self._in_flight.update((h, (fetch, index)) for index, h in enumerate(fetch.hashes))
        self._threads.submit(partial(self._find, fetch))
        return fetch

    def _is_decided(self, ticket: Ticket) -> bool:
        fetch = ticket.fetch
        return self._is_closed or fetch.is_done or fetch.num_arrived >= ticket.num_wanted

    def _find(self, fetch: Fetch) -> None:
        num_found = 0
        with self._guard.operation():
            num_found = self._store.match(fetch.before + fetch.hashes) - len(fetch.before)
            if num_found < 0:  # the beginning is not stored, the run may be all the same
                num_found = self._store.match(fetch.hashes)
        with self._changed:
            fetch.num_found = max(0, min(num_found, len(fetch.hashes)))
            self._go_on(fetch)

    def _go_on(self, fetch: Fetch) -> None:
        """Submit the next pieces, or finish when none is left; the lock is held."""
        while (
            fetch.num_running < self._pieces_at_once
            and fetch.num_submitted * BLOCKS_PER_PIECE < fetch.num_found
        ):
            if not self._threads.submit(partial(self._read_piece, fetch, fetch.num_submitted)):
                break
            fetch.num_submitted += 1
            fetch.num_running += 1
        if not fetch.num_running:
            self._finish(fetch)

    def _read_piece(self, fetch: Fetch, piece: int) -> None:
        start = piece * BLOCKS_PER_PIECE
        hashes = fetch.hashes[start : min(start + BLOCKS_PER_PIECE, fetch.num_found)]
        leases: list[HostLease] = []
        read: tuple[BlockHash, ...] = ()
        try:
            leases.append(self._host.lease(hashes))
            missing = hashes[len(leases[0].slots) :]
            if missing:
                leases.append(self._read_into_host(missing))
                read = missing[: len(leases[1].slots)]
        finally:  # whatever happens, nobody may wait for this piece for ever
            with self._changed:
                fetch.leases += leases
                fetch.read.update(read)
                self._fetched_blocks += len(read)
                num_arrived = sum(len(lease.slots) for lease in leases)
                self._record_piece(fetch, piece, num_arrived, len(hashes))

    def _read_into_host(self, hashes: tuple[BlockHash, ...]) -> HostLease:
        """Reserve, read, commit what is good; as few as none when memory or blocks are missing."""
        slots = self._host.reserve(len(hashes))
        if not slots:
            return self._host.commit((), ())
        wanted, buffers = hashes[: len(slots)], [self._host.buffer(slot) for slot in slots]
        num_good = 0
        with self._meter.running(), self._guard.operation():
            num_good = min(self._store.read_into(wanted, buffers), len(wanted))
        lease = self._host.commit(slots[:num_good], wanted[:num_good])
        self._host.cancel(slots[num_good:])
        return lease

    def _record_piece(self, fetch: Fetch, piece: int, num_arrived: int, num_wanted: int) -> None:
        """Advance over pieces that are complete in order; the lock is held."""
        fetch.num_running -= 1
        fetch.finished_pieces[piece] = num_arrived
        if num_arrived < num_wanted:
            fetch.num_found = min(fetch.num_found, piece * BLOCKS_PER_PIECE + num_arrived)
        while more := fetch.finished_pieces.pop(fetch.num_arrived // BLOCKS_PER_PIECE, 0):
            fetch.num_arrived += more
        self._go_on(fetch)
        self._changed.notify_all()

    def _finish(self, fetch: Fetch) -> None:
        """No block of this fetch is waited for any more; the lock is held."""
        if not fetch.is_done:
            fetch.is_done = True
            for block_hash in fetch.hashes:
                del self._in_flight[block_hash]
            self._changed.notify_all()
        self._release_unused(fetch)

    def _release_unused(self, fetch: Fetch) -> None:
        if fetch.is_done and not fetch.num_users:
            for lease in fetch.leases:
                self._host.release(lease)
            fetch.leases.clear()


class _BusyMeter:
    """Adds up the time in which at least one of several overlapping activities ran."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy_s = 0.0
        self._num_running = 0
        self._since_s = 0.0

    @property
    def busy_s(self) -> float:
        with self._lock:
            return self._busy_s

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._lock:
            if not self._num_running:
                self._since_s = time.monotonic()
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1
                if not self._num_running:
                    self._busy_s += time.monotonic() - self._since_s
