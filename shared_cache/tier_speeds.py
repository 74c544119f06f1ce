"""How fast each tier behind host memory is, and how long a run of blocks takes to come from them.

A run comes in pieces, several at a time, perhaps from several tiers one behind the other; what one
read takes depends on what else is under way. And a tier that was slow once would be left alone for
ever if nobody looked again. Pure; not thread-safe.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from shared_cache.estimates import LinkEstimate, RecentMedian

PROBE_AFTER_DECISIONS = 16
PROBE_AFTER_S = 30.0
"""A tier that is left alone is measured again after so many decisions, or so long."""

LookUpAdvice = Literal["wait", "probe", "skip"]
"""Whether to ask a tier what it has: and wait for it, only to measure it, or not at all."""

SURPRISE = 2.0
"""What is so many times faster than predicted is measured again at once."""


@dataclass(frozen=True, slots=True)
class TierBlocks:
    """The next `num_blocks` blocks of a prefix would come from the tier called `tier`.

    `num_in_flight` reads of it are under way in this process for other requests.
    """

    tier: str
    num_blocks: int
    num_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """What is known of one tier: `seconds = latency_s + num_bytes / bytes_per_s` for one read."""

    latency_s: float
    bytes_per_s: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class PieceRule:
    """How a run is read: so many blocks by one call of a store, so many calls at a time."""

    block_bytes: int
    blocks_per_piece: int = 8
    pieces_at_once: int = 4

    @property
    def piece_bytes(self) -> int:
        """Bytes of a whole piece."""
        return self.blocks_per_piece * self.block_bytes


class TierSpeeds:
    """The links of all tiers, by name; a tier is new when it is first heard of."""

    def __init__(self, rule: PieceRule) -> None:
        self._rule = rule
        self._tiers: dict[str, _Tier] = {}

    def saw_fetch(
        self, tier: str, num_bytes: int, seconds: float, num_in_flight: float, now_s: float
    ) -> None:
        """See `CostGate.saw_fetch`."""
        known = self._tiers.setdefault(tier, _Tier())
        known.saw_fetch(num_bytes, seconds, num_in_flight, now_s)

    def saw_look_up(self, tier: str, seconds: float, now_s: float) -> None:
        """See `CostGate.saw_look_up`."""
        self._tiers.setdefault(tier, _Tier()).look_up.add(seconds, now_s)

    def look_up_advice(self, tier: str, worth_s: float, now_s: float) -> LookUpAdvice:
        """See `CostGate.look_up`; `worth_s` is what it can spare at best."""
        known = self._tiers.setdefault(tier, _Tier())
        if known.look_up.median_s <= worth_s:
            return "wait"
        return "probe" if known.look_up.turn.is_due(now_s) else "skip"

    def refit(self) -> None:
        """Learn from the reads since the last call; call it before the questions below."""
        for tier in self._tiers.values():
            tier.link.refit()

    def are_known(self, available: Sequence[TierBlocks]) -> bool:
        """Whether every tier that has some of these blocks is measured."""
        tiers = (self._tiers.get(part.tier) for part in available if part.num_blocks)
        return all(tier is not None and tier.link.is_known for tier in tiers)

    def fetches(self, available: Sequence[TierBlocks]) -> Iterator[tuple[int, float]]:
        """How many blocks one may load, piece by piece from none on, and the seconds that takes.

        Pieces begin in order, each as soon as fewer than `pieces_at_once` are under way. The
        seconds never fall. All these tiers must be known.
        """
        yield 0, 0.0
        num_blocks, latest_s = 0, 0.0
        begun: list[_Piece] = []
        ends_s: list[float] = []
        for piece in self._pieces(available):
            num_blocks += piece.num_blocks
            if len(begun) < self._rule.pieces_at_once:
                begun.append(piece)
                ends_s = sorted(self._seconds(one, len(begun)) for one in begun)
            else:
                end_s = ends_s[0] + self._seconds(piece, self._rule.pieces_at_once)
                heapq.heapreplace(ends_s, end_s)
            latest_s = max(latest_s, *ends_s)
            yield num_blocks, latest_s

    def num_probe_blocks(
        self, available: Sequence[TierBlocks], num_blocks: int, now_s: float
    ) -> int:
        """Blocks behind the first `num_blocks` to fetch for the sake of measuring; mostly none.

        A piece of the first tier that gets no load. Nobody waits for it, so all that it costs is
        some of the link's time.
        """
        end = 0
        for part in available:
            if part.num_blocks and end == num_blocks:
                is_due = self._tiers[part.tier].turn.is_due(now_s)
                return min(self._rule.blocks_per_piece, part.num_blocks) if is_due else 0
            end += part.num_blocks
        return 0

    def all(self) -> dict[str, TierSpeed]:
        """What is known of each tier."""
        return {name: tier.speed(self._rule.piece_bytes) for name, tier in self._tiers.items()}

    def _pieces(self, available: Sequence[TierBlocks]) -> Iterator["_Piece"]:
        size = self._rule.blocks_per_piece
        for part in available:
            for start in range(0, part.num_blocks, size):
                yield _Piece(part, min(size, part.num_blocks - start))

    def _seconds(self, piece: "_Piece", num_at_once: int) -> float:
        link = self._tiers[piece.part.tier].link
        num_in_flight = num_at_once + piece.part.num_in_flight
        return link.seconds(piece.num_blocks * self._rule.block_bytes, num_in_flight)


@dataclass(frozen=True, slots=True)
class _Piece:
    part: TierBlocks
    num_blocks: int


class _Tier:
    """One tier's link and look-ups, and whether it is time to measure them again."""

    def __init__(self) -> None:
        self.link = LinkEstimate()
        self.turn = _ProbeTurn()
        self.look_up = _LookUp()

    def saw_fetch(self, num_bytes: int, seconds: float, num_in_flight: float, now_s: float) -> None:
        is_surprise = seconds * SURPRISE < self.link.seconds(num_bytes, num_in_flight)
        self.link.add(num_bytes, num_in_flight, seconds, now_s)
        self.turn.tried(now_s, again=is_surprise)

    def speed(self, piece_bytes: int) -> TierSpeed:
        latency_s = self.link.seconds(0)
        transfer_s = self.link.seconds(piece_bytes) - latency_s
        bytes_per_s = piece_bytes / transfer_s if transfer_s > 0 else math.inf
        return TierSpeed(latency_s, bytes_per_s, self.link.num_samples)


class _ProbeTurn:
    """When something that is passed over is to be measured again."""

    def __init__(self) -> None:
        self._num_passed_over = 0
        self._tried_s = 0.0

    def tried(self, now_s: float, *, again: bool) -> None:
        """It was measured; with `again` it is to be measured once more at once."""
        self._num_passed_over = PROBE_AFTER_DECISIONS if again else 0
        self._tried_s = now_s

    def is_due(self, now_s: float) -> bool:
        """Called when it is passed over; True at most once until the next sample."""
        self._num_passed_over += 1
        long_ago = now_s - self._tried_s >= PROBE_AFTER_S
        if self._num_passed_over <= PROBE_AFTER_DECISIONS and not long_ago:
            return False
        self.tried(now_s, again=False)
        return True


class _LookUp:
    """How long a tier takes to say what it has."""

    def __init__(self) -> None:
        self.turn = _ProbeTurn()
        self._seconds = RecentMedian()
        self._num_samples = 0

    @property
    def median_s(self) -> float:
        """0.0 as long as it is not known."""
        is_known = self._num_samples >= LinkEstimate.MIN_SAMPLES
        return (self._seconds.value or 0.0) if is_known else 0.0

    def add(self, seconds: float, now_s: float) -> None:
        self.turn.tried(now_s, again=seconds * SURPRISE < self.median_s)
        self._seconds.add(seconds)
        self._num_samples += 1
