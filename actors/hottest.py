"""Which prefixes a new replica should have in memory before anybody asks it for them. Pure.

What several requests had in common will be asked for again; what came last may be. A prefix is of
use only from its first block on, so whole ones are given, and none twice.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actors.request_log import RequestTrace
from shared_cache.hashing import BlockHash, ReuseScope


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """The leading blocks of a prompt, in the scope that they are stored under."""

    hashes: tuple[BlockHash, ...]
    scope: ReuseScope


def hottest(traces: Sequence[RequestTrace], max_blocks: int) -> list[HotPrefix]:
    """Prefixes of these requests, hottest first, with at most `max_blocks` different blocks."""
    uses = Counter(block_hash for trace in traces for block_hash in trace.hashes)
    shared = sorted(traces, key=lambda one: (-_num_spared(one, uses), -one.at_s))
    latest = sorted(traces, key=lambda one: -one.at_s)
    chosen: list[HotPrefix] = []
    given: set[BlockHash] = set()
    candidates = [*((one, _common(one, uses)) for one in shared), *((o, o.hashes) for o in latest)]
    for trace, hashes in candidates:
        kept = tuple(_within(hashes, given, max_blocks - len(given)))
        if kept and kept[-1] not in given:
            given.update(kept)
            chosen.append(HotPrefix(kept, trace.scope))
    return chosen


def _common(trace: RequestTrace, uses: Counter[BlockHash]) -> Sequence[BlockHash]:
    """The blocks that other requests had too."""
    return trace.hashes[: sum(1 for one in trace.hashes if uses[one] > 1)]


def _num_spared(trace: RequestTrace, uses: Counter[BlockHash]) -> int:
    """How many computations of blocks having this prefix would have spared."""
    return sum(uses[one] - 1 for one in trace.hashes)


def _within(hashes: Sequence[BlockHash], given: set[BlockHash], room: int) -> Iterator[BlockHash]:
    """The leading hashes, of which at most `room` are not among `given`."""
    for block_hash in hashes:
        room -= block_hash not in given
        if room < 0:
            return
        yield block_hash
