"""Bandwidth budgets: how much copying and fetching the running requests can bear.

Copies of new blocks and reads of the tiers use the memory and the links that decoding uses too. A
burst of long prompts would otherwise show as a pause in everybody else's answer.
"""

import threading
import time
from collections.abc import Callable

from shared_cache.estimates import RecentMedian

Clock = Callable[[], float]


class TurnBudget:
    """How many blocks may be copied off the device in one turn. Thread-safe; nothing waits.

    While requests decode, copies take at most `max_share` of the turns' time: each decoding turn
    earns that much time, each copied block spends some. What is not spent is kept, up to one turn's
    earnings (one block's time, if that is longer). There is no limit while nothing decodes, and
    none before both speeds are known.

    It is `SharedCache.turn_budget`. The engine tells it of its turns, the connector's worker of its
    copies, and the connector's scheduler asks once in each turn, in `build_connector_meta`:

        is_decoding = any request seen before computes behind its prompt's end
        max_blocks = budget.begin_turn(is_decoding)
        saves = what `RequestLedger.take_save` gives for each request, max_blocks in all
        budget.spend(number of blocks in saves)

    Blocks beyond `max_blocks` wait in the ledger for a later turn of their request.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._lock = threading.Lock()
        self._block_s = RecentMedian()
        self._turn_s = RecentMedian()
        self._credit_s = 0.0

    def begin_turn(self, is_decoding: bool) -> int | None:
        """Blocks that may be copied in this turn at most; None: no limit. *In the step.*"""
        with self._lock:
            block_s, turn_s = self._block_s.value, self._turn_s.value
            if not is_decoding or not block_s or turn_s is None:
                self._credit_s = 0.0
                return None
            earned_s = self._max_share * turn_s
            self._credit_s = min(self._credit_s + earned_s, max(earned_s, block_s))
            return max(0, int(self._credit_s / block_s + 1e-9))

    def spend(self, num_blocks: int) -> None:
        """So many blocks are copied in this turn. *In the step.*"""
        with self._lock:
            self._credit_s -= num_blocks * (self._block_s.value or 0.0)

    def saw_copies(self, num_blocks: int, seconds: float) -> None:
        """Copying `num_blocks` blocks off the device took `seconds`. *In the step.*

        On a CPU the time of the calls, on a GPU that between the events around the copies.
        """
        if num_blocks > 0:
            with self._lock:
                self._block_s.add(seconds / num_blocks)

    def saw_decode_turn(self, seconds: float) -> None:
        """A turn in which all requests decode took `seconds` without its copies. *In the step.*"""
        with self._lock:
            self._turn_s.add(seconds)


class BandwidthLimit:
    """Tells who wants to transfer how long to wait first. Thread-safe; itself waits for nothing."""

    def __init__(
        self, max_bytes_per_s: float | None, burst_s: float = 0.1, clock: Clock = time.monotonic
    ) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._burst_s = burst_s
        self._clock = clock
        self._lock = threading.Lock()
        self._booked_until_s = float("-inf")

    def delay_s(self, num_bytes: int) -> float:
        """Books `num_bytes`; seconds to wait before they may be transferred (0.0: go on).

        Transfers that heed it begin, in any time, with at most `max_bytes_per_s` of bytes, plus
        `burst_s` worth of it, plus one transfer. None: no limit.
        """
        if self._max_bytes_per_s is None:
            return 0.0
        with self._lock:
            now_s = self._clock()
            begin_s = max(self._booked_until_s, now_s - self._burst_s)
            self._booked_until_s = begin_s + num_bytes / self._max_bytes_per_s
            return max(0.0, begin_s - now_s)

    def give_back(self, num_bytes: int) -> None:
        """So many of the bytes that were booked are not transferred after all."""
        if self._max_bytes_per_s is not None:
            with self._lock:
                self._booked_until_s -= num_bytes / self._max_bytes_per_s

    def seconds(self, num_bytes: int) -> float:
        """How long it would take until `num_bytes` more are let through; books nothing."""
        if self._max_bytes_per_s is None or not num_bytes:
            return 0.0
        with self._lock:
            now_s = self._clock()
            begin_s = max(self._booked_until_s, now_s - self._burst_s)
            return max(0.0, begin_s + num_bytes / self._max_bytes_per_s - now_s)
