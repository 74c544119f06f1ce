"""Several processes stage and save on one arena for minutes; every block is checked for its bytes.

A block's bytes follow from its hash, so a reader needs nobody to know what must be there. Each
process plays requests of a common set of prompts: it leases what is here, looks at the bytes,
holds the lease for a while and looks again, and saves what was missing. The arena holds half of the
prompts, so blocks are evicted all the time.

    python -m benchmarks.arena_soak --minutes 10 --processes 4 --json report/soak.json
"""

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cases.arena import ROOT_HASH, host_config, namespace, opened, owned, shared_folder
from benchmarks.cases.rounds import TURN_BLOCKS, new_names
from benchmarks.provenance import provenance
from benchmarks.rivals.workload import aligned_blocks
from cluster.demo.report import write_json
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier, NewRun

SIZE = "720KiB"
NUM_PROMPTS = 24
PROMPT_BLOCKS = 64
ARENA_SHARE = 0.5
HOLD_EVERY = 16
"""Of so many requests, one keeps its lease until the next one of them."""


@dataclass
class Counts:
    """What one process did; `lost_leases` and `wrong_blocks` must stay 0."""

    requests: int = 0
    loaded_blocks: int = 0
    saved_blocks: int = 0
    refused_blocks: int = 0
    lost_leases: int = 0
    wrong_blocks: int = 0
    seconds: float = 0.0

    def add(self, other: "Counts") -> None:
        for field in fields(self):
            value = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, value)

    def gb_per_s(self, wall_s: float) -> float:
        moved = self.loaded_blocks + self.saved_blocks
        return moved * namespace(SIZE).layout.block_bytes / wall_s / 1e9


class Client:
    """One process's part: plays requests and checks what it reads."""

    def __init__(self, host: HostTier, seed: int) -> None:
        self.counts = Counts()
        self._host = host
        self._random = random.Random(seed)
        self._prompts = [new_names(f"prompt {i}", PROMPT_BLOCKS) for i in range(NUM_PROMPTS)]
        block_bytes = host.block_bytes
        self._pool = aligned_blocks(PROMPT_BLOCKS, block_bytes)
        self._words = self._pool.view(np.uint64)
        self._equal = np.empty(block_bytes // 8, np.bool_)
        self._held: tuple[HostLease, tuple[BlockHash, ...]] | None = None

    def play(self, seconds: float) -> None:
        """Requests for so long; the lease that is still held in the end is given back."""
        started_s = time.perf_counter()
        starter = multiprocessing.parent_process()
        while time.perf_counter() - started_s < seconds:
            if starter is not None and not starter.is_alive():
                raise SystemExit("the benchmark was killed")
            self._request()
        self._let_go()
        self.counts.seconds += time.perf_counter() - started_s

    def _request(self) -> None:
        names = self._random.choice(self._prompts)
        names = names[: self._random.randint(1, PROMPT_BLOCKS)]
        self.counts.requests += 1
        lease = self._host.lease(names)
        for row, slot in enumerate(lease.slots):
            np.copyto(self._pool[row], np.frombuffer(self._host.buffer(slot), np.uint8))
        for row, name in enumerate(names[: len(lease.slots)]):
            self.counts.wrong_blocks += not self._is_right(self._words[row], name)
        self.counts.loaded_blocks += len(lease.slots)
        self._check_held(lease, names)
        if lease.slots and not self.counts.requests % HOLD_EVERY:
            self._let_go()
            self._held = lease, names
        else:
            self._host.release(lease)
        self._save(names, len(lease.slots))

    def _save(self, names: tuple[BlockHash, ...], start: int) -> None:
        """Reserve, write and publish what the prompt lacks, a turn's blocks at a time."""
        while start < len(names):
            turn = names[start : start + TURN_BLOCKS]
            slots = self._host.reserve(len(turn))
            for slot, name in zip(slots, turn, strict=False):
                np.frombuffer(self._host.buffer(slot), np.uint64).fill(_word(name))
            parent = names[start - 1] if start else ROOT_HASH
            lease = self._host.commit(slots, NewRun(parent, turn[: len(slots)]))
            self.counts.saved_blocks += len(lease.slots)
            self.counts.refused_blocks += len(turn) - len(lease.slots)
            self._host.release(lease)
            if len(lease.slots) < len(turn):
                return
            start += len(turn)

    def _let_go(self) -> None:
        """After a while: the blocks under a lease are still there, and still the same."""
        if self._held is None:
            return
        (lease, names), self._held = self._held, None
        for slot, name in zip(lease.slots, names, strict=False):
            words = np.frombuffer(self._host.buffer(slot), np.uint64)
            self.counts.wrong_blocks += not self._is_right(words, name)
        self._check_held(lease, names)
        self._host.release(lease)

    def _check_held(self, lease: HostLease, names: tuple[BlockHash, ...]) -> None:
        again = self._host.lease_held(names[: len(lease.slots)])
        self.counts.lost_leases += again.slots != lease.slots
        self._host.release(again)

    def _is_right(self, words: Any, name: BlockHash) -> bool:
        return bool(np.equal(words, _word(name), out=self._equal).all())


def _word(name: BlockHash) -> np.uint64:
    """What a block of this name is filled with."""
    return np.uint64(int.from_bytes(name[:8], "little"))


def arena_bytes() -> int:
    num_blocks = int(NUM_PROMPTS * PROMPT_BLOCKS * ARENA_SHARE)
    return num_blocks * namespace(SIZE).layout.block_bytes


def play(folder: str, seed: int, seconds: float, ready: Any, results: Any) -> None:
    """One process."""
    with opened(host_config(Path(folder), arena_bytes()), namespace(SIZE)) as cache:
        client = Client(cache.host, seed)
        ready.wait(60)
        client.play(seconds)
        results.put(client.counts)


@contextmanager
def playing(folder: Path, num_processes: int, seconds: float) -> Iterator[Any]:
    """Processes that play for so long; gives the queue of their counts."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(num_processes), context.Queue()
    processes = [
        context.Process(target=play, args=(str(folder), seed, seconds, ready, results))
        for seed in range(num_processes)
    ]
    for process in processes:
        process.start()
    try:
        yield results
    finally:
        for process in processes:
            process.join(10)
            process.terminate()


def run(folder: Path, num_processes: int, seconds: float) -> Counts:
    total = Counts()
    with playing(folder, num_processes, seconds) as results:
        for _ in range(num_processes):
            total.add(results.get(timeout=60 + 2 * seconds))
    total.seconds /= num_processes
    return total


def soak(num_processes: int, seconds: float, alone_s: float) -> dict[str, Any]:
    """One process alone before and after all of them together, on one arena."""
    with ExitStack() as stack:
        folder = stack.enter_context(shared_folder())
        config = host_config(folder, arena_bytes())
        stack.enter_context(owned(config))
        cache = stack.enter_context(opened(config, namespace(SIZE)))
        Client(cache.host, seed=99).play(alone_s / 4)  # memory is touched for the first time
        before = run(folder, 1, alone_s)
        together = run(folder, num_processes, seconds)
        after = run(folder, 1, alone_s)
        stats = cache.host.stats()
    alone = (before.gb_per_s(before.seconds) + after.gb_per_s(after.seconds)) / 2
    aggregate = together.gb_per_s(together.seconds)
    return {
        "processes": num_processes,
        "minutes": seconds / 60,
        "lost_leases": together.lost_leases,
        "wrong_blocks": together.wrong_blocks,
        "aggregate_vs_one": aggregate / alone,
        "aggregate_gb_per_s": aggregate,
        "one_gb_per_s": alone,
        "together": asdict(together),
        "evicted_blocks": stats.evicted_blocks,
        "leased_slots_in_the_end": stats.leased_slots,
    }


def show(figures: dict[str, Any]) -> None:
    table = Table(title="several processes on one arena")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if not isinstance(value, dict):
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    for name, value in figures["together"].items():
        table.add_row(name, f"{value:,.0f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--alone-s", type=float, default=20.0, help="for each run of one process")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures = soak(args.processes, 60 * args.minutes, args.alone_s)
    show(figures)
    if args.json:
        write_json({**provenance(), **figures}, args.json)
    if figures["lost_leases"] or figures["wrong_blocks"]:
        raise SystemExit("leases were lost or blocks were wrong")


if __name__ == "__main__":
    main()
