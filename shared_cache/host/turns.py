"""Turns: the index's own time, in which uses of blocks are compared, and how long ago they were.

A block notes a turn, not a time: reading a clock for each of a million blocks is too slow. Two
questions need real time all the same, so the turns of some moments are remembered: which blocks
were not used lately (a clean-up of the shared tier may delete those), and of which it is long ago
that the shared tier was known to have them (somebody may have deleted them since).
"""

from shared_cache.host.terms import Clock

RECENT_S = 300.0
"""A block counts as in use for at least so long after it was asked for, and at most twice that."""

RECHECK_STORED_S = 1800.0
"""So long the shared tier is believed to have a block; at most twice that."""


class Turns:
    """Counts turns, and tells which of them are long ago."""

    def __init__(self, clock: Clock) -> None:
        self.now = 0
        self._clock = clock
        self._recent = _Past(RECENT_S, clock())
        self._stored = _Past(RECHECK_STORED_S, clock())

    def next(self) -> int:
        """A new turn."""
        now_s = self._clock()
        self._recent.look(self.now, now_s)
        self._stored.look(self.now, now_s)
        self.now += 1
        return self.now

    def unused(self) -> int:
        """What was not used after this turn has not been used lately."""
        self._recent.look(self.now, self._clock())
        return self._recent.turn

    @property
    def unchecked(self) -> int:
        """What was stored before this turn should be looked up again."""
        return self._stored.turn


class _Past:
    """A turn that is at least `age_s` ago: -1 at first, as of what was before nothing is known.

    To be looked at in each turn; it is at most twice as long ago then.
    """

    __slots__ = ("_age_s", "_mark_s", "_mark_turn", "turn")

    def __init__(self, age_s: float, now_s: float) -> None:
        self.turn = -1
        self._age_s = age_s
        self._mark_turn = 0
        self._mark_s = now_s

    def look(self, turn: int, now_s: float) -> None:
        """It is `now_s`, and `turn` was the last one."""
        elapsed_s = now_s - self._mark_s
        if elapsed_s >= self._age_s:
            self.turn = self._mark_turn if elapsed_s < 2 * self._age_s else turn
            self._mark_turn, self._mark_s = turn, now_s
