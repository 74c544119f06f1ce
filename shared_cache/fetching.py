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
from shared_cache.fetch_state import Fetch, Fetched, InFlight, Job, Ticket, Wish
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostTier
from shared_cache.pieces import Piece, PieceReader
from shared_cache.tiers import Tier, TieredStore

ABOUT_TO_ASK_S = 0.01
"""How long is waited for somebody who asks for blocks at the same time, in another thread."""

FIRST_LOOK_UP_BYTES = 128 << 20
LOOK_UP_GROWTH = 8
"""A longer run is looked up in parts: so many bytes of it, then so many times as many, and so on.

Looking up goes some ten times as fast as reading: what is found is read while the next part is
looked up, and there is always something to read."""

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
        self._block_bytes = host.block_bytes
        self._changed = threading.Condition()
        self._in_flight = InFlight(host)
        self._is_closed = False
        self._num_from_peers = 0

    @property
    def num_from_peers(self) -> int:
        """Blocks that were wanted here and that another process brought meanwhile."""
        return self._num_from_peers

    @contextmanager
    def fetched(self, wish: Wish, begun: Sequence[Ticket]) -> Iterator[Fetched]:
        """Bring the blocks of `wish`; those that came are leased in the block.

        `begun` are its tickets of `join`, and stay the caller's. Waits until its deadline at most.
        When a tier hangs while another one may have the blocks, that one is asked.
        """
        got = Fetched(list(begun))
        tickets = begun
        try:
            while not self._is_closed:
                got.is_decided = self.wait(tickets, wish.deadline_s)
                if not any(ticket.fetch.is_abandoned for ticket in tickets):
                    break
                tickets = self.join(wish)
                got.tickets += tickets
            yield got
        finally:
            self.leave(got.tickets[len(begun) :])

    def join(self, wish: Wish) -> list[Ticket]:
        """Have the blocks of `wish` fetched, those that are not on their way yet.

        Gives tickets in prefix order; none when all tiers are better left alone now. They must be
        given to `leave`.
        """
        nearest = self._tiers.nearest()
        with self._changed:
            self._abandon_stuck()
            if nearest is None or self._is_closed:
                return []
            tickets, begun, start = [], [], wish.start
            for fetch, end in self._in_flight.runs(wish.chain, start):
                if fetch is None:
                    begun.append(self._new(wish, start, end))
                elif fetch.num_awaited is None:
                    fetch.deadline_s = max(fetch.deadline_s, wish.deadline_s)
                tickets.append(self._in_flight.ticket(wish.chain[end - 1]))
                start = end
            for fetch in begun:
                self._ask(fetch, nearest)
                self._go_on(fetch)
            if begun:
                self._changed.notify_all()  # see `coming`
            return tickets

    def coming(self, chain: Sequence[BlockHash], start: int) -> list[Ticket]:
        """Tickets for what others have fetched now of `chain` from `start` on; begins no fetch.

        They must be given to `leave`. Where nobody fetches anything, somebody may be about to.
        """
        with self._changed:
            if self._in_flight.runs(chain, start)[:1] == [(None, len(chain))]:
                self._changed.wait(ABOUT_TO_ASK_S)
            tickets = []
            for fetch, end in self._in_flight.runs(chain, start):
                if fetch is None:
                    break
                tickets.append(self._in_flight.ticket(chain[end - 1]))
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

    def _new(self, wish: Wish, start: int, end: int) -> Fetch:
        chain = tuple(wish.chain[:end])
        fetch = Fetch(chain, start, wish.scope, wish.deadline_s, wish.num_prompt_tokens)
        self._in_flight.add(fetch)
        return fetch

    def _submit(
        self, fetch: Fetch, tier: Tier | None, step: Callable[..., None], *args: Piece
    ) -> bool:
        """Have a thread of `tier` do `step(fetch, job, *args)`; False if there is none for it.

        The lock is held.
        """
        if tier is None:
            return False
        job = Job(tier, is_read=bool(args))
        if not tier.threads.submit(partial(job.run, step, fetch, *args)):
            return False
        fetch.jobs.append(job)
        return True

    def _ask(self, fetch: Fetch, tier: Tier | None) -> None:
        """Look for the rest of the run in `tier`, or in the next one that answers soon enough.

        If there is none, it is settled what arrives. The lock is held.
        """
        while tier is not None:
            present = fetch.start + fetch.num_worth
            blocks = range(present, len(fetch.chain))
            advice = self._gate.look_up(tier.url, blocks, fetch.num_prompt_tokens)
            if advice == "wait" and self._submit(fetch, tier, self._look_up):
                return
            fetch.was_skipped |= advice != "wait"
            if advice == "probe":
                self._submit(fetch, tier, self._probe)
            tier = self._tiers.behind(tier)
        fetch.num_awaited = fetch.num_worth
        if fetch.num_wanted < fetch.num_found:
            self._in_flight.shorten(fetch, fetch.num_wanted)

    def _look_up(self, fetch: Fetch, job: Job) -> None:
        """Ask one tier what it has of the rest of the run; begin to read that, ask the next one.

        A long run lies in many objects: its first blocks are read while the others are looked for.
        """
        tier, since_s = job.tier, time.monotonic()
        start = fetch.start + fetch.num_found
        num_blocks = max(1, FIRST_LOOK_UP_BYTES // self._block_bytes)
        num_more = tier.num_stored(fetch.chain[: start + num_blocks], start)
        self._gate.saw_look_up(tier.url, time.monotonic() - since_s)
        while num_more == num_blocks and start + num_blocks < len(fetch.chain):
            if fetch.is_done or fetch.is_cut_short:
                break
            self._found(fetch, tier, num_more)
            start, num_blocks = start + num_blocks, LOOK_UP_GROWTH * num_blocks
            num_more = tier.num_stored(fetch.chain[: start + num_blocks], start)
        with self._settling(fetch):
            fetch.jobs.remove(job)
            if fetch.is_done:
                return
            if num_more:
                fetch.sources.append((tier, fetch.num_found + num_more))
            self._decide(fetch)
            lacks_more = fetch.num_found < len(fetch.hashes) and not fetch.is_cut_short
            self._ask(fetch, self._tiers.behind(tier) if lacks_more else None)
            self._go_on(fetch)
            self._changed.notify_all()

    def _found(self, fetch: Fetch, tier: Tier, num_more: int) -> None:
        """Begin to read what `tier` has for certain, before all that it has is known."""
        with self._settling(fetch):
            if not fetch.is_done:
                fetch.sources.append((tier, fetch.num_found + num_more))
                self._decide(fetch)
                self._go_on(fetch)

    @contextmanager
    def _settling(self, fetch: Fetch) -> Iterator[None]:
        """Hold the lock; whatever happens in the block, nobody may wait for `fetch` for ever."""
        with self._changed:
            try:
                yield
            except BaseException:
                self._finish(fetch)
                raise

    def _probe(self, fetch: Fetch, job: Job) -> None:
        """Measure how long a tier takes to say what it has; nobody waits for it."""
        since_s = time.monotonic()
        job.tier.num_stored(fetch.chain, fetch.start + fetch.num_found)
        self._gate.saw_look_up(job.tier.url, time.monotonic() - since_s)
        with self._changed:
            fetch.jobs.remove(job)
            if not fetch.is_done:
                self._go_on(fetch)

    def _decide(self, fetch: Fetch) -> None:
        """Have what is worth it fetched of all that was found so far; the lock is held.

        Few blocks of a near tier may be worth it only with the many behind them in a far one, or
        only for somebody who has more time and joined meanwhile. What is on its way already counts
        once more: it takes of the time that is left.
        """
        if fetch.is_cut_short or fetch.num_found <= fetch.num_worth:
            return
        now_s = time.monotonic()
        decision = self._gate.blocks_to_load(
            fetch.start + fetch.num_arrived,
            fetch.to_come(),
            fetch.num_prompt_tokens,
            deadline_s=max(0.0, fetch.deadline_s - now_s),
        )
        fetch.decided(decision, now_s)

    def _go_on(self, fetch: Fetch) -> None:
        """Submit the next pieces, or finish when none is left; the lock is held."""
        while not self._is_closed and len(fetch.jobs) < self._pieces_at_once:
            following = fetch.next_piece(self._pieces_at_once, self._block_bytes)
            if following is None:
                break
            tier, start, end = following
            piece = Piece(fetch.chain[: fetch.start + end], fetch.start + start, fetch.scope)
            if not self._submit(fetch, tier, self._read_piece, piece):
                break
            fetch.num_submitted = end
        if not fetch.jobs:
            self._finish(fetch)

    def _read_piece(self, fetch: Fetch, job: Job, piece: Piece) -> None:
        """Read a piece from one tier; what that one cannot give after all, from the next one."""
        lacks_more, since_s, num_before = False, time.monotonic(), len(piece.read)
        try:
            lacks_more = self._reader.read(piece, job.tier)
        finally:  # whatever happens, nobody may wait for this piece for ever
            following = self._tiers.behind(job.tier) if lacks_more else None
            with self._changed:
                fetch.jobs.remove(job)
                num_read, took_s = len(piece.read) - num_before, time.monotonic() - since_s
                fetch.saw_read(job.tier, num_read, num_read * self._block_bytes, took_s)
                self._take_over(fetch, piece)
                if fetch.is_done:
                    self._in_flight.release_unused(fetch)
                elif not self._submit(fetch, following, self._read_piece, piece):
                    fetch.is_unreadable |= lacks_more
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
        is_news = fetch.finished(start, start + len(piece.hashes), piece.num_here)
        while fetch.decisions and fetch.decisions[0].end <= fetch.num_arrived:
            decided = fetch.decisions.pop(0)
            self._gate.saw_stage(decided.decision, time.monotonic() - decided.since_s)
        self._go_on(fetch)
        if is_news:
            self._changed.notify_all()

    def _abandon_stuck(self) -> None:
        """End fetches that wait for tiers which hang only; the lock is held.

        Their reads go on where they are, and give back what they hold when they end.
        """
        for fetch in self._in_flight.all():
            if fetch.jobs and all(job.is_stuck() for job in fetch.jobs):
                fetch.is_abandoned = self._tiers.nearest() is not None
                self._finish(fetch)

    def _finish(self, fetch: Fetch) -> None:
        """No block of this fetch is waited for any more; the lock is held."""
        self._in_flight.finish(fetch)
        self._changed.notify_all()
