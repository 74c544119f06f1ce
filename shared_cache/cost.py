"""What loading costs and what computing costs: load only what is sooner there than computed.

Without it a slow tier makes a cache worse than none: a request waits for blocks that its engine
would have computed meanwhile. Nothing here is configured by hand: tiers and engine are measured as
they are used, and what is not measured yet is tried. Pure: samples and questions in, decisions out.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shared_cache.estimates import PrefillEstimate, RecentMedian, Span
from shared_cache.pacing import BandwidthLimit
from shared_cache.tier_speeds import LookUpAdvice, PieceRule, TierBlocks, TierSpeed, TierSpeeds

Clock = Callable[[], float]
GateKind = Literal["load", "split", "compute"]

ERROR_SAMPLES = 63
"""Errors that the medians in `GateStats` are taken over."""

MAX_UNREAD_TURNS = 256
"""Measured turns kept until the next decision."""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Load the next `num_blocks` blocks and wait for them; the engine computes the rest.

    `num_probe_blocks` right behind them are to be fetched too, but nobody waits for them: they
    measure a tier that is left alone otherwise. `fetch_s` and `prefill_s` are what was predicted
    (None: not known yet).
    """

    num_blocks: int
    kind: GateKind
    num_probe_blocks: int = 0
    fetch_s: float | None = None
    prefill_s: float | None = None


@dataclass(frozen=True, slots=True)
class GateStats:
    """Decisions by kind, and how far predictions were off.

    Errors are medians of recent `|predicted - real| / real`; None before the first one. `untested`
    of the decisions loaded because something was not measured yet, `probes` had blocks fetched that
    nobody waited for.
    """

    loads: int
    splits: int
    computes: int
    untested: int
    probes: int
    fetch_error: float | None
    prefill_error: float | None
    prefill_tokens_per_s: float | None
    tiers: dict[str, TierSpeed]


class CostGate:
    """Decides for one replica what to load; learns from what loading and computing took.

    It is `SharedCache.gate`: the fetcher asks it and tells it of reads, the engine of its turns.
    Thread-safe. With `is_on` False it learns all the same, and loads everything.
    """

    def __init__(
        self,
        tokens_per_block: int,
        rule: PieceRule,
        is_on: bool = True,
        clock: Clock = time.monotonic,
        budget: BandwidthLimit | None = None,
    ) -> None:
        """`budget` is the bandwidth that all reads of this replica share."""
        self._block_bytes = rule.block_bytes
        self._budget = budget or BandwidthLimit(None)
        self._tokens_per_block = tokens_per_block
        self._is_on = is_on
        self._clock = clock
        self._lock = threading.Lock()
        self._tiers = TierSpeeds(rule)
        self._prefill = PrefillEstimate()
        self._unread_turns: deque[_MeasuredTurn] = deque(maxlen=MAX_UNREAD_TURNS)
        self._counts: Counter[str] = Counter()
        self._fetch_error = RecentMedian(ERROR_SAMPLES)
        self._prefill_error = RecentMedian(ERROR_SAMPLES)

    def blocks_to_load(
        self,
        num_present: int,
        available: Sequence[TierBlocks],
        num_prompt_tokens: int,
        *,
        deadline_s: float = math.inf,
    ) -> GateDecision:
        """What to load for a prompt whose first `num_present` blocks are on the device or in host.

        `available` says, in prefix order, where the blocks behind those are (after the tiers were
        asked). `deadline_s` is the longest that the request will wait. Before the tiers and the
        engine were measured, and with the gate off, all that is available is loaded.
        """
        num_available = sum(part.num_blocks for part in available)
        if not num_available:
            return GateDecision(0, "compute")
        with self._lock:
            self._learn()
            if not self._is_on or not self._is_known(available):
                self._counts["load"] += 1
                self._counts["untested"] += self._is_on
                return GateDecision(num_available, "load")
            best_s, best = math.inf, GateDecision(0, "compute")
            for num_loaded, link_s in self._tiers.fetches(available):
                fetch_s = max(link_s, self._budget.seconds(num_loaded * self._block_bytes))
                if fetch_s > deadline_s:
                    break
                prefill_s = self._prefill_s(num_present + num_loaded, num_prompt_tokens)
                total_s = fetch_s + prefill_s
                if total_s <= best_s:  # of equals the larger load: it spares the engine
                    kind = _kind(num_loaded, num_available)
                    best_s, best = total_s, GateDecision(num_loaded, kind, 0, fetch_s, prefill_s)
            self._counts[best.kind] += 1
            num_probe = self._tiers.num_probe_blocks(available, best.num_blocks, self._clock())
            self._counts["probe"] += num_probe > 0
            return replace(best, num_probe_blocks=num_probe)

    def look_up(self, tier: str, blocks: range, num_prompt_tokens: int) -> LookUpAdvice:
        """Whether to ask `tier` which of these blocks of a prompt it has, and to wait for that.

        Not when the answer alone usually takes longer than computing all of them; then it is asked
        now and then all the same, to see whether it has become faster.
        """
        with self._lock:
            self._learn()
            if not self._is_on or not self._prefill.is_known:
                return "wait"
            without_s = self._prefill_s(blocks.start, num_prompt_tokens)
            spared_s = without_s - self._prefill_s(blocks.stop, num_prompt_tokens)
            return self._tiers.look_up_advice(tier, spared_s, self._clock())

    def saw_look_up(self, tier: str, seconds: float) -> None:
        """`tier` took so long to say what it has."""
        with self._lock:
            self._tiers.saw_look_up(tier, seconds, self._clock())

    def saw_fetch(self, tier: str, num_bytes: int, seconds: float, num_in_flight: float) -> None:
        """One read of a store brought `num_bytes` in `seconds`.

        `num_in_flight` reads of that tier ran in this process meanwhile, this one counted (the mean
        of when it began and when it ended). Call it for good, whole reads only: not for misses,
        faults, or what was in host memory already.
        """
        with self._lock:
            self._tiers.saw_fetch(tier, num_bytes, seconds, num_in_flight, self._clock())

    def saw_stage(self, decision: GateDecision, seconds: float) -> None:
        """The blocks that `decision` wanted were all there `seconds` after it was made."""
        if decision.num_blocks and decision.fetch_s is not None:
            with self._lock:
                self._fetch_error.add(_error(decision.fetch_s, seconds))

    def saw_prefill(self, spans: Sequence[Span], seconds: float) -> None:
        """One turn that only computed prompts took `seconds`, copies of blocks not counted.

        `spans` has `(num_past_tokens, num_new_tokens)` of each request in it. *In the step*: waits
        for no lock.
        """
        self._unread_turns.append(_MeasuredTurn(tuple(spans), seconds, self._clock()))

    def worth(self, tier: str, start: int, stop: int) -> bool:
        """Whether loading blocks `[start, stop)` from `tier` would be sooner than computing them.

        True as long as that is not known. For `TierConfig.admission: worth`, before writing.
        """
        part = TierBlocks(tier, stop - start)
        with self._lock:
            self._learn()
            if not self._is_on or not self._is_known([part]) or stop <= start:
                return True
            *_, (_, fetch_s) = self._tiers.fetches([part])
            num_tokens = (stop - start) * self._tokens_per_block
            return fetch_s < self._prefill.seconds(start * self._tokens_per_block, num_tokens)

    def stats(self) -> GateStats:
        """A snapshot; cheap."""
        with self._lock:
            self._learn()
            return GateStats(
                loads=self._counts["load"],
                splits=self._counts["split"],
                computes=self._counts["compute"],
                untested=self._counts["untested"],
                probes=self._counts["probe"],
                fetch_error=self._fetch_error.value,
                prefill_error=self._prefill_error.value,
                prefill_tokens_per_s=self._prefill.tokens_per_s if self._prefill.is_known else None,
                tiers=self._tiers.all(),
            )

    def _is_known(self, available: Sequence[TierBlocks]) -> bool:
        """Whether all that a decision needs is measured.

        Not when only a farther tier is unknown: to reach it, the nearer ones are loaded too.
        """
        return self._prefill.is_known and self._tiers.are_known(available)

    def _learn(self) -> None:
        """Learn from what was measured since the last decision."""
        turns = [self._unread_turns.popleft() for _ in range(len(self._unread_turns))]
        if self._prefill.is_known:
            for turn in turns:
                predicted_s = self._prefill.turn_seconds(turn.spans)
                self._prefill_error.add(_error(predicted_s, turn.seconds))
        for turn in turns:
            self._prefill.add(turn.spans, turn.seconds, turn.ended_s)
        self._prefill.refit()
        self._tiers.refit()

    def _prefill_s(self, num_blocks: int, num_prompt_tokens: int) -> float:
        """Seconds to compute a prompt behind `num_blocks`; at least one token is computed."""
        num_past = num_blocks * self._tokens_per_block
        return self._prefill.seconds(num_past, max(1, num_prompt_tokens - num_past))


@dataclass(frozen=True, slots=True)
class _MeasuredTurn:
    spans: tuple[Span, ...]
    seconds: float
    ended_s: float


def _kind(num_loaded: int, num_available: int) -> GateKind:
    if not num_loaded:
        return "compute"
    return "load" if num_loaded == num_available else "split"


def _error(predicted_s: float, real_s: float) -> float:
    return abs(predicted_s - real_s) / max(real_s, 1e-9)
