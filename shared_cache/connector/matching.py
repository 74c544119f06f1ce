"""The match call's look at the cache: as long as the rule allows, and never longer.

TensorRT-LLM asks for the match while its reuse tree is locked, and all ranks wait for the answer: a
look-up that hangs there would stall every request. So where a look-up may have to wait for another
process or for a store, a thread of its own does it, and the call returns in time without it; what
comes too late is given back. A look-up that hangs is not followed by a second one. All requests
that one turn lets in share the time: each would be in time by itself, and the turn late.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.interface import HostLease
from shared_cache.prefix_cache import PrefixCache, StagedPrefix
from shared_cache.threads import IoThreads

OWNER_WAIT_S = 0.05
"""How long the owner of the node's memory may take to say what is here, where no store is asked."""

OWNER_TURN_S = 0.2
"""The same for all requests together that are let in between two turns."""

ENDING_PART = 0.2
"""Part of the time that is kept for leasing what has arrived, once the wait for it ends."""


@dataclass(frozen=True, slots=True)
class MatchRule:
    """How far a match looks.

    `staged_ahead`: this process has staged and leased the prefix before the engine asks; the match
    is a look-up in its memory. Else the node's owner is asked, and with `wait_s` above 0 the tiers
    too: the match then answers after that time at most, with what has arrived by then. `wait_s` is
    for a whole turn: once its requests have used it up, the others get what host memory holds,
    for which the owner is asked `OWNER_TURN_S` in all at most.
    """

    staged_ahead: bool = True
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request can use: the blocks `hashes[first:]`, best those before `num_reusable`.

    A block from `num_reusable` on is leased if it is here, and not waited for.
    """

    hashes: Sequence[BlockHash]
    first: int
    num_reusable: int
    scope: ReuseScope

    @property
    def nothing(self) -> StagedPrefix:
        """The answer that nothing of it is here."""
        return StagedPrefix(HostLease(0, ()), first=self.first, scope=self.scope)


class Matcher:
    """Leases what may be promised to one engine. Used on the engine's loop thread."""

    def __init__(self, cache: PrefixCache, rule: MatchRule) -> None:
        self._cache = cache
        self._rule = rule
        self._threads = None if rule.staged_ahead else IoThreads(1, "kvcommons-match")
        self._last: _LookUp | None = None
        self.begin_turn()

    def begin_turn(self) -> None:
        """The requests that were let in so far are planned: those that follow have time again."""
        self._left_s, self._owner_left_s = self._rule.wait_s, OWNER_TURN_S

    def lease(self, wanted: Wanted) -> StagedPrefix:
        """What is here of it now, or arrives in time. Give it to `PrefixCache.release`."""
        if wanted.first >= len(wanted.hashes):
            return wanted.nothing
        if self._threads is None:
            return self._cache.lease_held(wanted.hashes, wanted.first, wanted.scope)
        start_s = time.monotonic()
        ending_s = ENDING_PART * self._rule.wait_s
        if self._left_s > ending_s:
            until_s = start_s + self._left_s
            staged = self._look_up(wanted, until_s, until_s - ending_s)
            self._left_s -= time.monotonic() - start_s
        else:
            until_s = start_s + min(OWNER_WAIT_S, self._owner_left_s)
            staged = self._look_up(wanted, until_s, 0.0)
            self._owner_left_s -= time.monotonic() - start_s
        if staged is not None:
            return staged
        self._cache.miss_deadline()
        return wanted.nothing

    def _look_up(self, wanted: Wanted, until_s: float, grow_until_s: float) -> StagedPrefix | None:
        """What is found until then; None: nobody knows. Tiers are not asked if the time is up."""
        is_free = self._last is None or self._last.has_ended
        assert self._threads is not None
        if not is_free or until_s <= time.monotonic():
            return None
        look_up = _LookUp(self._cache, wanted, grow_until_s)
        if not self._threads.submit(look_up.run):
            return None
        self._last = look_up
        return look_up.result(until_s)

    def close(self) -> None:
        """Look up nothing from now on."""
        if self._threads is not None:
            self._threads.stop()


class _LookUp:
    """One look-up in a thread of its own, and who takes what it finds: the match, or nobody."""

    def __init__(self, cache: PrefixCache, wanted: Wanted, grow_until_s: float) -> None:
        self._cache = cache
        self._wanted = wanted
        self._grow_until_s = grow_until_s
        self._changed = threading.Condition()
        self._found: StagedPrefix | None = None
        self._error: Exception | None = None
        self._is_late = False
        self.has_ended = False

    def run(self) -> None:
        """Look; what nobody waits for any more is given back."""
        found, error = None, None
        try:
            found = self._look()
        except Exception as raised:
            error = raised
        with self._changed:
            self._found, self._error, self.has_ended = found, error, True
            self._changed.notify_all()
            is_late = self._is_late
        if is_late and found is not None:
            self._cache.release(found)

    def result(self, until_s: float) -> StagedPrefix | None:
        """What was found, or None when that takes longer; raises what looking raised."""
        with self._changed:
            while not self.has_ended:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    self._is_late = True
                    return None
                self._changed.wait(left_s)
        if self._error is not None:
            raise self._error
        return self._found

    def _look(self) -> StagedPrefix:
        wanted = self._wanted
        staged = self._cache.lease(wanted.hashes, wanted.first, wanted.scope)
        left_s = self._grow_until_s - time.monotonic()
        if staged.end >= wanted.num_reusable or left_s <= 0:
            return staged
        return self._cache.grow(staged, wanted.hashes[: wanted.num_reusable], left_s)
