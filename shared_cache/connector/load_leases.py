"""Until when the leases of loads are held: a copy that is under way must not lose its source.

Nobody tells the scheduler's side when a copy is done. It prevents that host memory is given to
other blocks while a device still reads it. Pure.
"""

from collections import deque
from dataclasses import dataclass

from shared_cache.staged import StagedPrefix

TURNS_UNTIL_COPIED = 2
"""A load's lease ends this many turns later. An engine has at most one forward pass in flight
besides the one it prepares, so by then the pass that waited for the copy has been sampled; on every
rank, as no rank begins a turn before all have ended the one before (`get_finished` is gathered)."""

ABANDONED_S = 30.0
"""The lease of a load ahead whose request has ended is kept for so long: nobody says here when such
a load is done, and by then it is, many times over."""


@dataclass(frozen=True, slots=True)
class _Copied:
    request_id: int
    turn: int
    lease: StagedPrefix


class LoadLeases:
    """The leases of loads that were planned. Turns are numbers that go up."""

    def __init__(self) -> None:
        self._copied: list[_Copied] = []
        self._ahead: dict[int, StagedPrefix] = {}
        self._abandoned: deque[tuple[int, float, StagedPrefix]] = deque()

    def in_turn(self, request_id: int, turn: int, lease: StagedPrefix) -> None:
        """A load that the forward pass of `turn` waits for."""
        self._copied.append(_Copied(request_id, turn, lease))

    def ahead(self, request_id: int, lease: StagedPrefix) -> None:
        """A load that begins now, and is done when the engine reports its request."""
        self._ahead[request_id] = lease

    def is_ahead(self, request_id: int) -> bool:
        """Whether this request's load ahead may be under way."""
        return request_id in self._ahead

    def reported(self, request_id: int) -> StagedPrefix:
        """The lease of a load ahead whose request is reported: every rank has it."""
        return self._ahead.pop(request_id)

    def dropped(self, request_id: int, turn: int, now_s: float) -> None:
        """The request is gone; its load ahead may still be under way."""
        lease = self._ahead.pop(request_id, None)
        if lease is not None:
            self._abandoned.append((turn, now_s, lease))

    def take_over(
        self, turn: int, now_s: float, request_id: int | None = None
    ) -> list[StagedPrefix]:
        """The leases of loads that are copied for sure, those of `request_id` a turn sooner."""
        over = []
        while self._abandoned:
            since_turn, since_s, lease = self._abandoned[0]
            if turn - since_turn < TURNS_UNTIL_COPIED or now_s - since_s < ABANDONED_S:
                break
            over.append(lease)
            self._abandoned.popleft()
        kept = []
        for load in self._copied:
            age = turn - load.turn
            if age >= TURNS_UNTIL_COPIED or (age >= 1 and load.request_id == request_id):
                over.append(load.lease)
            else:
                kept.append(load)
        self._copied = kept
        return over
