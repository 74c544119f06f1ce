"""Hit rates of the eviction policies on a trace, through the real index of the host tier.

Each request leases what is here of its prompt, writes the rest, and keeps its lease until a few
more requests have come. `optimum` knows the future: it drops what is asked for again last.

    python -m benchmarks.eviction --trace conversation_trace.jsonl --json report/eviction.json
"""

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance
from benchmarks.traces import ROOT, GeneratedTraffic, TraceRequest, read_trace
from cluster.demo.report import write_json
from shared_cache.eviction import EvictionPolicy, S3FifoPolicy, make_policy
from shared_cache.hashing import BlockHash
from shared_cache.host.index import BlockRecord, Clock, HostIndex, IndexRules
from shared_cache.host.interface import DEFAULT_RETENTION, NewRun, Retention

MakePolicy = Callable[[Clock], EvictionPolicy]

BLOCK_BYTES = 4096
"""The index counts slots; no bytes are moved here."""
HOLDER = 1


@dataclass(frozen=True)
class Figure:
    """One replay. `hit_rate` is of all blocks asked for; the time includes the index."""

    policy: str
    capacity_share: float
    capacity_blocks: int
    hit_rate: float
    evicted_blocks: int
    us_per_block: float


class NoJournal:
    """Nothing outlives a replay."""

    def reserved(self, slot: int, holder: int) -> None:
        pass

    def published(self, slot: int, namespace: int, record: BlockRecord, checksum: int) -> None:
        pass

    def stored(self, slot: int) -> None:
        pass

    def freed(self, slot: int) -> None:
        pass

    def extent_assigned(self, extent: int, namespace: int, slot_bytes: int) -> bool:
        return True


class Tier:
    """The real index without an arena: leases, reservations and evictions, but no bytes."""

    def __init__(self, num_blocks: int, make: MakePolicy, clock: Clock) -> None:
        rules = IndexRules(make_policy=make, admission="never")
        num_bytes = num_blocks * BLOCK_BYTES
        self._index = HostIndex(num_bytes, num_bytes, rules, NoJournal(), clock)
        self._namespace = self._index.open_namespace("trace", BLOCK_BYTES)
        self._index.attach(HOLDER, self._namespace)

    def use(self, hashes: Sequence[BlockHash]) -> tuple[int, tuple[int, ...]]:
        """Lease a prompt and write what is missing: blocks that were here, slots to release."""
        claim = self._index.claim(HOLDER, self._namespace, hashes)
        num_hits, num_new = len(claim.grant.slots), len(claim.slots)
        parent = hashes[num_hits - 1] if num_hits else ROOT
        new = tuple(hashes[num_hits : num_hits + num_new])
        run = NewRun(parent, new, checksums=(0,) * num_new)
        grant = self._index.commit(HOLDER, self._namespace, claim.slots, run)
        return num_hits, claim.grant.slots + grant.slots

    def release(self, slots: Sequence[int]) -> None:
        self._index.release(HOLDER, slots)

    @property
    def evicted_blocks(self) -> int:
        return self._index.stats(self._namespace).evicted_blocks


class Future:
    """When each block is asked for next; for `OptimalPolicy`."""

    def __init__(self, requests: Sequence[TraceRequest]) -> None:
        self._uses_of: dict[BlockHash, deque[int]] = {}
        self.depth_of: dict[BlockHash, int] = {}
        for number, request in enumerate(requests):
            for depth, block_hash in enumerate(request.hashes):
                self._uses_of.setdefault(block_hash, deque()).append(number)
                self.depth_of[block_hash] = depth

    def next_use(self, block_hash: BlockHash, now: float) -> float:
        """The first request after `now` that asks for it; time only goes on."""
        uses = self._uses_of[block_hash]
        while uses and uses[0] <= now:
            uses.popleft()
        return uses[0] if uses else inf


class OptimalPolicy(EvictionPolicy):
    """Drops what is asked for again last (Belady): no policy can do better by much."""

    def __init__(self, future: Future, clock: Clock) -> None:
        self._future = future
        self._clock = clock
        self._next_use_of: dict[BlockHash, float] = {}
        self._heap: list[tuple[float, int, BlockHash]] = []

    def inserted(self, run: Sequence[BlockHash], retention: Retention = DEFAULT_RETENTION) -> None:
        for block_hash in run:
            self._next_use_of[block_hash] = self._future.next_use(block_hash, self._clock())
            self._push(block_hash)

    def accessed(self, run: Sequence[BlockHash]) -> None:
        self.inserted(run)

    def removed(self, block_hash: BlockHash) -> None:
        del self._next_use_of[block_hash]

    def evict(self, num_blocks: int, try_evict: Callable[[BlockHash], bool]) -> int:
        refused, num_evicted = set(), 0
        while num_evicted < num_blocks and self._heap:
            negative_use, _, block_hash = heappop(self._heap)
            if self._next_use_of.get(block_hash) != -negative_use or block_hash in refused:
                continue
            if try_evict(block_hash):
                del self._next_use_of[block_hash]
                num_evicted += 1
            else:
                refused.add(block_hash)
        for block_hash in refused:
            self._push(block_hash)
        return num_evicted

    def __len__(self) -> int:
        return len(self._next_use_of)

    def _push(self, block_hash: BlockHash) -> None:
        depth = self._future.depth_of[block_hash]
        heappush(self._heap, (-self._next_use_of[block_hash], -depth, block_hash))


def policies(requests: Sequence[TraceRequest]) -> dict[str, MakePolicy]:
    """All that are compared. Each optimum needs a future of its own, as it uses it up."""
    return {
        "lru": partial(make_policy, "lru"),
        "s3fifo": partial(make_policy, "s3fifo"),
        "s3fifo, half small": lambda clock: S3FifoPolicy(small_share=0.5),
        "priority": partial(make_policy, "priority"),
        "optimum": lambda clock: OptimalPolicy(Future(requests), clock),
    }


def replay(
    requests: Sequence[TraceRequest], num_blocks: int, make: MakePolicy, num_in_flight: int
) -> tuple[int, Tier, float]:
    """Blocks that were hit, the tier afterwards, and seconds; the clock counts requests."""
    now = -1.0
    tier = Tier(num_blocks, make, lambda: now)
    in_flight: deque[tuple[int, ...]] = deque()
    num_hits, started = 0, time.perf_counter()
    for number, request in enumerate(requests):
        now = float(number)
        hits, slots = tier.use(request.hashes)
        num_hits += hits
        in_flight.append(slots)
        if len(in_flight) > num_in_flight:
            tier.release(in_flight.popleft())
    return num_hits, tier, time.perf_counter() - started


@dataclass(frozen=True)
class TraceSize:
    """`endless_hit_rate` is that of a tier that never evicts."""

    requests: int
    blocks: int
    distinct_blocks: int

    @property
    def endless_hit_rate(self) -> float:
        return 1 - self.distinct_blocks / self.blocks


def size_of(requests: Sequence[TraceRequest]) -> TraceSize:
    distinct = {block_hash for request in requests for block_hash in request.hashes}
    return TraceSize(len(requests), sum(len(r.hashes) for r in requests), len(distinct))


def measure(
    requests: Sequence[TraceRequest], shares: Sequence[float], num_in_flight: int
) -> list[Figure]:
    size, figures = size_of(requests), []
    for share in shares:
        num_blocks = max(1, int(size.distinct_blocks * share))
        for name, make in policies(requests).items():
            hits, tier, seconds = replay(requests, num_blocks, make, num_in_flight)
            us = seconds / size.blocks * 1e6
            rate = hits / size.blocks
            figures.append(Figure(name, share, num_blocks, rate, tier.evicted_blocks, us))
    return figures


def print_table(size: TraceSize, figures: Sequence[Figure]) -> None:
    names = list(dict.fromkeys(f.policy for f in figures))
    title = (
        f"Hit rate: {size.requests} requests, {size.blocks} blocks, "
        f"{size.distinct_blocks} distinct; {size.endless_hit_rate:.1%} without evictions"
    )
    table = Table("share", "blocks", *names, title=title)
    for share in dict.fromkeys(f.capacity_share for f in figures):
        row = [f for f in figures if f.capacity_share == share]
        rates = [f"{f.hit_rate:.2%}" for f in row]
        table.add_row(f"{share:.1%}", str(row[0].capacity_blocks), *rates)
    means = [
        sum(f.us_per_block for f in figures if f.policy == name) * len(names) / len(figures)
        for name in names
    ]
    table.add_row("us per block", "", *[f"{mean:.1f}" for mean in means])
    Console().print(table)


def report(args: argparse.Namespace, size: TraceSize, figures: list[Figure]) -> dict[str, Any]:
    """The figures with what one has to know to make them again."""
    return {
        **provenance(),
        "trace": {
            "name": args.trace.name if args.trace else f"generated, seed {args.seed}",
            **asdict(size),
            "endless_hit_rate": size.endless_hit_rate,
        },
        "in_flight": args.in_flight,
        "figures": [asdict(figure) for figure in figures],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="JSONL in Mooncake's format; default: generated")
    parser.add_argument("--seed", type=int, default=0, help="of the generated trace")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    parser.add_argument("--in-flight", type=int, default=8, help="requests that hold their lease")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    requests = read_trace(args.trace) if args.trace else GeneratedTraffic(args.seed).requests()
    size, figures = size_of(requests), measure(requests, args.shares, args.in_flight)
    print_table(size, figures)
    if args.json:
        write_json(report(args, size, figures), args.json)


if __name__ == "__main__":
    main()
