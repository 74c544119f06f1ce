"""Fetching: runs of blocks on their way from the tiers into the host tier.

A burst of requests with one system prompt would read the same blocks once per request. Here every
block on its way belongs to exactly one `Fetch`; whoever needs it too waits for the same one, and
what another process of this machine is reading is waited for as well. A fetch goes in pieces,
several at a time, so that a request whose time runs out still gets what has arrived, in order, and
no long prompt keeps the threads from a short one.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from shared_cache.cost import CostGate
from shared_cache.fetch_state import Decided, Fetch, Fetched, InFlight, Limit, Ticket
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.interface import HostTier
from shared_cache.pieces import Piece, PieceReader
from shared_cache.tier_speeds import TierBlocks
from shared_cache.tiers import Tier, TieredStore

POLL_S = 0.1
"""How often who waits looks whether a tier hangs that another one could stand in for."""


class Fetcher:
    """Reads missing blocks into the host tier, each block once however many requests want it.

    Nothing here raises for a fault of a store.
    """

    def __init__(
        self,
        host: HostTier,
        tiers: TieredStore,
        reader: PieceReader,
        pieces_at_once: int,
        gate: CostGate,
    ) -> None:
        self._tiers = tiers
        self._reader = reader
        self._pieces_at_once = pieces_at_once
        self._gate = gate
        self._changed = threading.Condition()
        self._in_flight = InFlight(host)
        self._is_closed = False
        self._num_from_peers = 0

    @property
    def num_from_peers(self) -> int:
        """Blocks that were wanted here and that another process brought meanwhile."""
        return self._num_from_peers

    @contextmanager
    def fetched(
        self,
        chain: Sequence[BlockHash],
        start: int,
        scope: ReuseScope,
        deadline_s: float,
        limit: Limit,
    ) -> Iterator[Fetched]:
        """Bring the blocks of `chain` from `start` on; those that came are leased in the block.

        Waits until `deadline_s` (a time of `time.monotonic`) at most. When a tier hangs while
        another one may have the blocks, that one is asked.
        """
        got = Fetched()
        try:
            while not self._is_closed:
                tickets = self.join(chain, start, scope, limit)
                got.tickets += tickets
                got.is_decided = self.wait(tickets, deadline_s)
                if not any(ticket.fetch.is_abandoned for ticket in tickets):
                    break
            yield got
        finally:
            self.leave(got.tickets)

    def join(
        self, chain: Sequence[BlockHash], start: int, scope: ReuseScope, limit: Limit
    ) -> list[Ticket]:
        """Have the blocks of `chain` from `start` on fetched, those that are not on their way yet.

        Gives tickets in prefix order; none when all tiers are better left alone now. They must be
        given to `leave`.
        """
        nearest = self._tiers.nearest()
        with self._changed:
            self._abandon_stuck()
            if nearest is None or self._is_closed:
                return []
            tickets = []
            for fetch, end in self._in_flight.runs(chain, start):
                if fetch is None:
                    self._begin(Fetch(tuple(chain[:end]), start, scope, limit), nearest)
                tickets.append(self._in_flight.ticket(chain[end - 1]))
                start = end
            return tickets

    def wait(self, tickets: Sequence[Ticket], deadline_s: float) -> bool:
        """Wait until it is decided how much of `tickets` arrives; False when time ran out first."""
        with self._changed:
            for ticket in tickets:
                while not (self._is_closed or ticket.fetch.is_decided(ticket.num_wanted)):
                    left_s = deadline_s - time.monotonic()
                    if left_s <= 0:
                        return False
                    self._changed.wait(left_s if len(self._tiers.tiers) == 1 else POLL_S)
                    self._abandon_stuck()
                if ticket.fetch.num_arrived < ticket.num_wanted:
                    break  # a gap: what lies beyond it is of no use
        return True

    def leave(self, tickets: Sequence[Ticket]) -> None:
        """Give up interest: the leases end when nobody is interested."""
        with self._changed:
            for ticket in tickets:
                self._in_flight.give_up(ticket)

    def close(self) -> None:
        """Stop; whoever waits returns at once with what has arrived."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._reader.close()
        self._tiers.close_threads()
        with self._changed:
            for fetch in self._in_flight.all():
                self._finish(fetch)

    def _begin(self, fetch: Fetch, nearest: Tier) -> None:
        self._in_flight.add(fetch)
        self._submit(fetch, nearest, self._look_up)

    def _submit(
        self, fetch: Fetch, tier: Tier | None, step: Callable[..., None], *args: Piece
    ) -> bool:
        """Have a thread of `tier` do `step(fetch, tier, *args)`; False if there is none for it.

        The lock is held.
        """
        if tier is None or not tier.threads.submit(partial(step, fetch, tier, *args)):
            return False
        fetch.jobs.append(tier)
        return True

    def _look_up(self, fetch: Fetch, tier: Tier) -> None:
        """Ask one tier what it has of the rest of the run; begin to read that, ask the next one."""
        num_known = fetch.num_wanted
        num_found = tier.num_stored(fetch.chain, fetch.start + num_known)
        following = self._tiers.behind(tier)
        with self._changed:
            fetch.jobs.remove(tier)
            if fetch.is_done:
                return
            try:
                goes_on = self._want(fetch, tier, num_known, num_found)
            except BaseException:  # whatever happens, nobody may wait for this fetch for ever
                self._finish(fetch)
                raise
            if not (goes_on and self._submit(fetch, following, self._look_up)):
                fetch.num_awaited = fetch.num_worth
            self._go_on(fetch)
            self._changed.notify_all()

    def _want(self, fetch: Fetch, tier: Tier, start: int, num_found: int) -> bool:
        """Have what is worth it fetched of the blocks found; whether to look for those behind.

        The lock is held; nothing here waits.
        """
        if fetch.is_cut_short or not num_found:
            return not fetch.is_cut_short
        found = TierBlocks(tier.url, num_found, tier.num_in_flight)
        decision = fetch.limit(fetch.start + start, found)
        fetch.num_worth = start + decision.num_blocks
        fetch.num_wanted = min(fetch.num_worth + decision.num_probe_blocks, start + num_found)
        fetch.sources.append((tier, start + num_found))
        fetch.decisions.append(Decided(decision, time.monotonic(), fetch.num_worth))
        return start + num_found == fetch.num_worth < len(fetch.hashes)

    def _go_on(self, fetch: Fetch) -> None:
        """Submit the next pieces, or finish when none is left; the lock is held."""
        while not self._is_closed and len(fetch.jobs) < self._pieces_at_once:
            following = fetch.next_piece()
            if following is None:
                break
            tier, start, end = following
            piece = Piece(fetch.chain[: fetch.start + end], fetch.start + start, fetch.scope)
            if not self._submit(fetch, tier, self._read_piece, piece):
                break
            fetch.num_submitted = end
        if not fetch.jobs:
            self._finish(fetch)

    def _read_piece(self, fetch: Fetch, tier: Tier, piece: Piece) -> None:
        """Read a piece from one tier; what that one cannot give after all, from the next one."""
        lacks_more = False
        try:
            lacks_more = self._reader.read(piece, tier)
        finally:  # whatever happens, nobody may wait for this piece for ever
            following = self._tiers.behind(tier) if lacks_more else None
            with self._changed:
                fetch.jobs.remove(tier)
                self._take_over(fetch, piece)
                if fetch.is_done:
                    self._in_flight.release_unused(fetch)
                elif not self._submit(fetch, following, self._read_piece, piece):
                    self._record_piece(fetch, piece)

    def _take_over(self, fetch: Fetch, piece: Piece) -> None:
        """The leases and counts of what the reader has brought; the lock is held."""
        fetch.leases += piece.leases
        fetch.read |= piece.read
        self._num_from_peers += piece.num_from_peers
        piece.leases, piece.num_from_peers = [], 0

    def _record_piece(self, fetch: Fetch, piece: Piece) -> None:
        """Note how a piece ended, and go on; the lock is held."""
        start = piece.start - fetch.start
        fetch.finished(start, start + len(piece.hashes), piece.num_here)
        while fetch.decisions and fetch.decisions[0].end <= fetch.num_arrived:
            decided = fetch.decisions.pop(0)
            self._gate.saw_stage(decided.decision, time.monotonic() - decided.since_s)
        self._go_on(fetch)
        self._changed.notify_all()

    def _abandon_stuck(self) -> None:
        """End fetches that wait for tiers which hang only; the lock is held.

        Their reads go on where they are, and give back what they hold when they end.
        """
        for fetch in self._in_flight.all():
            if fetch.jobs and all(tier.reading.is_hanging() for tier in fetch.jobs):
                fetch.is_abandoned = self._tiers.nearest() is not None
                self._finish(fetch)

    def _finish(self, fetch: Fetch) -> None:
        """No block of this fetch is waited for any more; the lock is held."""
        self._in_flight.finish(fetch)
        self._changed.notify_all()
