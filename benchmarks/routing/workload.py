"""Arrivals at a given rate, made from a trace: shifted copies of it with private blocks.

Playing a trace faster would shorten the pauses between the turns of a conversation, and with them
what a cache has to remember. So the time scale stays; the load is scaled by copies of the trace,
each begun at another place, whose blocks are their own but for the prompts that everybody shares,
and thinned by whole sessions.
"""

import bisect
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.routing.hardware import TOKENS_PER_BLOCK
from benchmarks.traces import TraceRequest

COMMON_SHARE = 0.01
"""Blocks of more than this share of the requests are common to all copies: system prompts."""

Row = tuple[float, int, int, tuple[int, ...], int]
"""When, tokens, output tokens, full blocks, and the number of the session."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request; `session` numbers the conversation that it belongs to.

    With `after`, the number of an earlier one, it comes when that one has ended.
    """

    at_s: float
    num_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: int
    after: int | None = None


class Workload:
    """A trace with numbered blocks, ready to be copied.

    `jitter_s` spreads requests whose times are whole multiples of it.
    """

    def __init__(self, name: str, requests: Sequence[TraceRequest], jitter_s: float = 0.0) -> None:
        self.name = name
        self.jitter_s = jitter_s
        numbers: dict[bytes, int] = {}
        for request in requests:
            for block in request.hashes:
                numbers.setdefault(block, len(numbers))
        self._stride = len(numbers)
        prompts = [[numbers[block] for block in one.hashes] for one in requests]
        self._common = _common_blocks(prompts)
        pairs = zip(requests, prompts, strict=True)
        self._rows = [_row(request, blocks, self._common) for request, blocks in pairs]
        self._first_s = requests[0].timestamp_s
        self.span_s = max(1e-9, requests[-1].timestamp_s - self._first_s + jitter_s)
        self.rate = len(requests) / self.span_s

    def arrivals(self, rate: float, duration_s: float, seed: int) -> list[Arrival]:
        """Requests for `duration_s` seconds, `rate` of them a second on average, in order."""
        draw = random.Random(f"arrivals {self.name} {seed}")
        num_copies = max(1, -int(-rate / self.rate // 1))
        keep = rate / (self.rate * num_copies)
        found: list[Arrival] = []
        for copy in range(num_copies):
            found.extend(self._copy(copy, keep, duration_s, draw))
        return sorted(found, key=lambda one: one.at_s)

    def _copy(
        self, copy: int, keep: float, duration_s: float, draw: random.Random
    ) -> Iterator[Arrival]:
        shift_s = draw.random() * self.span_s
        salt = draw.getrandbits(32)
        times = [row[0] for row in self._rows]
        first = bisect.bisect_left(times, self._first_s + shift_s)
        for at in range(len(self._rows) * (1 + int(duration_s // self.span_s))):
            turn, index = divmod(first + at, len(self._rows))
            when_s, num_tokens, output_tokens, blocks, session = self._rows[index]
            at_s = when_s - self._first_s - shift_s + turn * self.span_s
            if at_s >= duration_s:
                return
            if _fraction(session, salt) < keep:
                private = tuple(self._private(block, copy) for block in blocks)
                yield Arrival(
                    at_s=at_s + draw.random() * self.jitter_s,
                    num_tokens=num_tokens,
                    output_tokens=output_tokens,
                    blocks=private,
                    session=session + copy * self._stride,
                )

    def _private(self, block: int, copy: int) -> int:
        return block if block in self._common else block + copy * self._stride


def _row(request: TraceRequest, blocks: Sequence[int], common: frozenset[int]) -> Row:
    """A session is named by its first block that is not common."""
    full = max(0, request.num_tokens - 1) // TOKENS_PER_BLOCK
    session = next((block for block in blocks if block not in common), blocks[-1])
    tokens = request.num_tokens, max(1, request.output_tokens)
    return (request.timestamp_s, *tokens, tuple(blocks[:full]), session)


def _common_blocks(prompts: Sequence[Sequence[int]]) -> frozenset[int]:
    uses = Counter(block for blocks in prompts for block in blocks)
    least = COMMON_SHARE * len(prompts)
    return frozenset(block for block, count in uses.items() if count > least)


def _fraction(number: int, salt: int) -> float:
    """A number in [0, 1) that depends on both, evenly."""
    mixed = (number * 0x9E3779B97F4A7C15 + salt * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed ^= mixed >> 31
    return (mixed * 0x94D049BB133111EB & (1 << 64) - 1) / (1 << 64)
