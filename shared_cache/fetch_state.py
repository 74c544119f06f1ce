"""What is known of blocks on their way: one record per run, shared by all who want its blocks."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from shared_cache.cost import GateDecision
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.interface import HostLease, HostTier
from shared_cache.pieces import BLOCKS_PER_PIECE, Piece
from shared_cache.shortfalls import Shortfall
from shared_cache.tier_speeds import TierBlocks
from shared_cache.tiers import Tier

MOST_BLOCKS_PER_PIECE = 4 * BLOCKS_PER_PIECE
"""Another process that wants one of these blocks waits for all of them."""

FAST_BLOCKS_PER_PIECE = 8 * BLOCKS_PER_PIECE
FAST_BYTES_PER_S = 1e9
"""Where pieces come as fast as this, more blocks are read at a time: then the questions to the host
tier take longer than the reads."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The blocks of `chain` from `start` on, before `deadline_s` (a time of `time.monotonic`).

    `num_prompt_tokens` is how long the whole prompt is.
    """

    chain: Sequence[BlockHash]
    start: int
    scope: ReuseScope
    deadline_s: float
    num_prompt_tokens: int


@dataclass(eq=False, slots=True)
class Job:
    """Something asked of a tier, and the thread that does it once it has begun."""

    tier: Tier
    is_read: bool = False
    thread: threading.Thread | None = None

    def run(self, step: Callable[..., None], fetch: "Fetch", *args: Piece) -> None:
        """`step(fetch, self, *args)`, in the thread that does this job from now on."""
        self.thread = threading.current_thread()
        step(fetch, self, *args)

    def is_stuck(self) -> bool:
        """Whether nothing comes of it now: its tier hangs, or others answer and this one does not.

        It may end all the same one day.
        """
        is_lost = self.thread is not None and self.tier.threads.crew.is_replaced(self.thread)
        return is_lost or self.tier.reading.is_hanging()


@dataclass(eq=False, slots=True)
class Fetch:
    """One run on its way; the fetcher's lock guards all that changes.

    `chain` goes from the prompt's first block to the run's last one, which begins at `start`: a
    store that never saw the run finds it by the object that it lies in, which may begin earlier.
    All other positions are counted from `start`. `sources` says up to where which tier has the run;
    of it `num_worth` blocks are worth fetching and `num_wanted` are fetched: those behind only
    measure a tier. `num_awaited` are waited for; None as long as more may be found: until then
    whoever joins with more time extends `deadline_s`. `wanted` says of how many leading blocks
    somebody waits, or waited, for the last one. `num_arrived` leading blocks are in host memory,
    leased by this fetch; it holds its leases until it is done and nobody uses it any more. `read`
    are the blocks that a tier delivered. `jobs` are what it waits for. `was_skipped`: a tier was
    not asked, as its answer alone would have come too late; `is_unreadable`: a tier did not give
    what it had named. `fast_tier`: its last piece came fast.
    """

    chain: tuple[BlockHash, ...]
    start: int
    scope: ReuseScope
    deadline_s: float
    num_prompt_tokens: int
    num_worth: int = 0
    num_wanted: int = 0
    num_awaited: int | None = None
    num_arrived: int = 0
    num_submitted: int = 0
    is_cut_short: bool = False
    is_done: bool = False
    is_abandoned: bool = False
    was_skipped: bool = False
    is_unreadable: bool = False
    fast_tier: Tier | None = None
    num_users: int = 0
    wanted: set[int] = field(default_factory=set)
    jobs: list[Job] = field(default_factory=list)
    sources: list[tuple[Tier, int]] = field(default_factory=list)
    decisions: list["Decided"] = field(default_factory=list)
    read: set[BlockHash] = field(default_factory=set)
    leases: list[HostLease] = field(default_factory=list)
    finished_pieces: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.chain) - self.start

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The blocks of the run."""
        return self.chain[self.start :]

    @property
    def num_found(self) -> int:
        """Leading blocks that some tier has."""
        return self.sources[-1][1] if self.sources else 0

    def to_come(self) -> list[TierBlocks]:
        """Where the blocks are that were found and have not arrived yet."""
        parts, start = [], self.num_arrived
        for tier, end in self.sources:
            if end > start:
                num_own = sum(job.is_read and job.tier is tier for job in self.jobs)
                num_others = max(0, tier.num_in_flight - num_own)
                parts.append(TierBlocks(tier.url, end - start, num_others))
                start = end
        return parts

    def decided(self, decision: GateDecision, now_s: float) -> None:
        """So many of the blocks `to_come` are worth it; what was worth it before stays so."""
        num_worth = max(self.num_worth, self.num_arrived + decision.num_blocks)
        num_wanted = num_worth + decision.num_probe_blocks
        self.num_wanted = max(self.num_wanted, min(num_wanted, self.num_found))
        if num_worth > self.num_worth:
            self.decisions.append(Decided(decision, now_s, num_worth))
            self.num_worth = num_worth

    def is_decided(self, num_blocks: int) -> bool:
        """Whether it is known how many of the first `num_blocks` blocks arrive."""
        if self.num_awaited is not None:
            num_blocks = min(num_blocks, self.num_awaited)
        return self.is_done or self.num_arrived >= num_blocks

    def next_piece(self, num_at_once: int, block_bytes: int) -> tuple[Tier, int, int] | None:
        """The tier and the place of the next blocks to read; None when there are none now.

        A tier that likes long reads gets them, as each costs questions to the host tier; but all of
        `num_at_once` jobs get something to do, where they are not fast, and the first two reads are
        short, for who has not the time for more.
        """
        start = self.num_submitted
        if start >= self.num_wanted:
            return None
        tier, end = next((tier, end) for tier, end in self.sources if end > start)
        end = min(end, self.num_wanted)
        size, long = BLOCKS_PER_PIECE, min(tier.blocks_per_read, MOST_BLOCKS_PER_PIECE)
        if start >= 2 * BLOCKS_PER_PIECE and long > size:
            fair_share = -(-(end - start) // num_at_once)
            if self._is_fast(tier, FAST_BLOCKS_PER_PIECE * block_bytes):
                # In whole objects, which are often as long as such reads.
                fair_share += -fair_share % long
                long = FAST_BLOCKS_PER_PIECE
            size = max(size, min(fair_share, long))
        return tier, start, min(start + size, end)

    def saw_read(self, tier: Tier, num_blocks: int, num_bytes: int, seconds: float) -> None:
        """So much came from `tier` in so long by one read, with all that was asked for it."""
        if num_blocks >= BLOCKS_PER_PIECE:
            is_fast = num_bytes >= FAST_BYTES_PER_S * seconds
            self.fast_tier = tier if is_fast else None

    def _is_fast(self, tier: Tier, num_bytes: int) -> bool:
        """Whether a piece of so much from `tier` comes in time, if it is as fast as before."""
        left_s = self.deadline_s - time.monotonic()
        return tier is self.fast_tier and num_bytes <= FAST_BYTES_PER_S * left_s

    def finished(self, start: int, end: int, num_here: int) -> bool:
        """A piece ended with `num_here` blocks; advances over pieces that are complete in order.

        True when that has decided for somebody how much arrives. Whoever waits is to be woken then
        only: a requester that looks after every piece keeps the threads that read from the
        interpreter's lock.
        """
        before = self.num_arrived
        self.finished_pieces[start] = num_here
        if start + num_here < end:
            self.is_cut_short = True
            self.num_wanted = min(self.num_wanted, start + num_here)
        while more := self.finished_pieces.pop(self.num_arrived, 0):
            self.num_arrived += more
        is_for_somebody = any(before < wanted <= self.num_arrived for wanted in self.wanted)
        return is_for_somebody or self.is_decided(len(self))


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided, at which time, about the blocks up to `end` of a run."""

    decision: GateDecision
    since_s: float
    end: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request's interest in the first `num_wanted` blocks of a fetch."""

    fetch: Fetch
    num_wanted: int


@dataclass(slots=True)
class Fetched:
    """What a request got: leased by the fetcher until the request leaves."""

    tickets: list[Ticket] = field(default_factory=list)
    is_decided: bool = True

    @property
    def delivered(self) -> set[BlockHash]:
        """The blocks of these fetches that a tier has delivered so far."""
        return set().union(*(ticket.fetch.read for ticket in self.tickets))


def why_short(tickets: Sequence[Ticket], position: int, is_decided: bool) -> Shortfall:
    """Why block `position` of a chain did not come by these tickets."""
    covering = [one.fetch for one in tickets if 0 <= position - one.fetch.start < len(one.fetch)]
    if not covering:
        return "tier_in_trouble"
    fetch = covering[-1]
    index = position - fetch.start
    if not is_decided:
        return "deadline"
    if index >= fetch.num_found:
        return "cost_gate" if fetch.was_skipped else "not_stored"
    if index >= fetch.num_worth:
        return "cost_gate"
    return "unreadable" if fetch.is_unreadable else "no_room"


class InFlight:
    """Which blocks are on their way, in which fetch. Not thread-safe: the fetcher's lock guards it.

    A fetch belongs here until it is `finished`; its leases end when nobody uses it any more either.
    """

    def __init__(self, host: HostTier) -> None:
        self._host = host
        self._fetches: dict[BlockHash, tuple[Fetch, int]] = {}

    def all(self) -> list[Fetch]:
        """Every fetch that is not finished, once."""
        return list({id(fetch): fetch for fetch, _ in self._fetches.values()}.values())

    def runs(self, chain: Sequence[BlockHash], start: int) -> list[tuple[Fetch | None, int]]:
        """`chain` from `start` on as runs: in which fetch each is (None: in none), and its end."""
        runs = []
        for fetch, group in groupby(chain[start:], lambda h: self._fetches.get(h, (None, 0))[0]):
            start += sum(1 for _ in group)
            runs.append((fetch, start))
        return runs

    def add(self, fetch: Fetch) -> None:
        """These blocks, none of which is in another fetch, are on their way from now on."""
        self._fetches.update((h, (fetch, index)) for index, h in enumerate(fetch.hashes))

    def ticket(self, last: BlockHash) -> Ticket:
        """A new user's interest in a fetch up to its block `last`."""
        fetch, index = self._fetches[last]
        fetch.num_users += 1
        fetch.wanted.add(index + 1)
        return Ticket(fetch, index + 1)

    def give_up(self, ticket: Ticket) -> None:
        """One user less."""
        ticket.fetch.num_users -= 1
        self.release_unused(ticket.fetch)

    def finish(self, fetch: Fetch) -> None:
        """No block of this fetch is waited for any more."""
        if not fetch.is_done:
            fetch.is_done = True
            self.shorten(fetch, 0)
        self.release_unused(fetch)

    def shorten(self, fetch: Fetch, num_blocks: int) -> None:
        """Only the first `num_blocks` blocks are on their way: who wants others decides anew."""
        for block_hash in fetch.hashes[num_blocks:]:
            if self._fetches.get(block_hash, (None, 0))[0] is fetch:
                del self._fetches[block_hash]

    def release_unused(self, fetch: Fetch) -> None:
        """End the leases of a finished fetch that nobody uses; call it after adding some."""
        if fetch.is_done and not fetch.num_users:
            for lease in fetch.leases:
                self._host.release(lease)
            fetch.leases.clear()
