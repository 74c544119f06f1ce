"""Where the time of a fetch goes: blocks from a local store's page cache into the node's arena.

`read` is system calls alone, `read+hash` hashes every piece right after it was read, `read, hash`
hashes a whole block in one call; in threads, and in several processes with threads, which shows
what the interpreter's lock costs. `stage` is the cache itself with its arena's owner, and once more
with its calls counted by phase; `stage+load` goes on into the pool by the connector's copier. All
take turns, round by round until time is over; medians count.

    python -m benchmarks.gpu.fetch --json FILE
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks.cases.arena import ROOT_HASH, host_config, namespace, owned, shared_folder
from benchmarks.cases.page_cache import (
    ReaderProcess,
    Reads,
    StoredBlock,
    Took,
    Way,
    read_in,
    reader_processes,
)
from benchmarks.cases.phases import OUTSIDE, Phases, Spent, print_phases
from benchmarks.cases.rounds import new_names
from benchmarks.cases.stager import Stager
from benchmarks.gpu.ttft import cache_config
from benchmarks.gpu.workbench import GPU, arguments, device, report, scratch
from shared_cache.config import HostConfig
from shared_cache.hashing import BlockHash
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES
from shared_cache.host.folder import open_folder
from shared_cache.media.local_medium import LocalMedium
from shared_cache.media.page_cache import share_in_memory
from shared_cache.opening import open_cache
from shared_cache.stores.fs_store import open_store
from shared_cache.stores.run_objects import read_head
from shared_cache.stores.store import BlockRun

SPACE = namespace("4MiB")
BLOCK_BYTES = SPACE.layout.block_bytes
NUM_BLOCKS, DRY_BLOCKS = 256, 16
NUM_SOURCES = 16
"""Blocks with bytes of their own; the others repeat them."""

THREADS = (1, 4, 8, 12, 16)
PIECES = (256 << 10, 1 << 20, BLOCK_BYTES)
PROCESSES = ((2, 4), (2, 8), (4, 2), (4, 4), (8, 2))
"""Processes, and threads in each of them."""

IO_THREADS = (2, 4, 8)
"""Settings of the cache; the last one also loads."""

Case = Callable[[], Took]
Placed = tuple[str, int, int]
"""A block's file, its begin there, and its checksum."""


def write_store(folder: Path, names: tuple[BlockHash, ...]) -> list[Placed]:
    """Write the blocks as one run, as a save does; where each of them lies."""
    source = np.random.default_rng(3).integers(0, 256, (NUM_SOURCES, BLOCK_BYTES), dtype=np.uint8)
    payloads = tuple(memoryview(source[i % NUM_SOURCES]).toreadonly() for i in range(len(names)))
    store = open_store(folder.as_uri(), SPACE)
    store.write(BlockRun(ROOT_HASH, names, payloads))
    store.close()
    found: dict[BlockHash, Placed] = {}
    for path in folder.rglob("*.arrow"):
        medium = LocalMedium(str(path.parent.parent))
        head = read_head(medium, f"{path.parent.name}/{path.name}", SPACE)
        for row, name in enumerate(head.hashes):
            start, _ = head.place_of(row, 1, BLOCK_BYTES)
            found[name] = (str(path), start, head.checksums[row])
    return [found[name] for name in names]


def share_of_files_in_memory(paths: set[str]) -> float | None:
    """The smallest part of a file that is in the page cache; None where that is not told.

    They are written out first: that would disturb what is measured.
    """
    shares: list[float] = []
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        share = share_in_memory(descriptor, 0, os.fstat(descriptor).st_size)
        shares += [] if share is None else [share]
        os.close(descriptor)
    return min(shares, default=None)


@contextmanager
def bare_cases(
    host: HostConfig, names: Sequence[BlockHash], placed: Sequence[Placed]
) -> Iterator[dict[str, Case]]:
    """Reading into slots of the arena without the cache, by name."""
    arena = open_folder(host).arena
    with closing(open_cache(cache_config(host, arena.parent, saves=False), SPACE)) as cache:
        slots: list[int] = []
        while wanted := len(names) - len(slots):  # the owner adds one extent a question
            claimed = cache.host.claim(new_names(f"bare {wanted}", wanted)).slots
            if not claimed:
                raise SystemExit(f"the arena has {len(slots)} slots for {len(names)} blocks")
            slots += claimed
        blocks = [
            StoredBlock(
                path, start, slot * SLOT_ALIGNMENT_BYTES, int.from_bytes(name[:8], "little"), known
            )
            for slot, name, (path, start, known) in zip(slots, names, placed, strict=True)
        ]
        num_processes = max((count for count, _ in PROCESSES), default=0)
        with reader_processes(num_processes, arena, blocks, BLOCK_BYTES) as processes:
            reads = Reads(blocks, [cache.host.buffer(slot) for slot in slots])
            reads.run(Way(1, BLOCK_BYTES, "none"))  # touches the memory
            yield {**thread_cases(reads), **process_cases(processes)}
            reads.close()
        cache.host.cancel(slots)


def thread_cases(reads: Reads) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for threads in THREADS:
        for piece in PIECES:
            size = f"{piece >> 10:4} KiB, {threads:2} threads"
            cases[f"read       {size}"] = partial(reads.run, Way(threads, piece, "none"))
            cases[f"read+hash  {size}"] = partial(reads.run, Way(threads, piece, "pieces"))
        whole = Way(threads, BLOCK_BYTES, "block")
        cases[f"read, hash {size}"] = partial(reads.run, whole)
    return cases


def process_cases(processes: Sequence[ReaderProcess]) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for count, threads in PROCESSES:
        for piece in PIECES[1:]:
            way = Way(threads, piece, "pieces")
            name = f"read+hash  {piece >> 10:4} KiB, {count} processes of {threads} threads"
            cases[name] = partial(read_in, processes[:count], way)
    return cases


def stage_cases(stagers: dict[int, Stager]) -> dict[str, Case]:
    cases: dict[str, Case] = {f"stage, {n} io_threads": one.stage for n, one in stagers.items()}
    last = max(stagers)
    cases[f"stage+load, {last} io_threads"] = stagers[last].stage_and_load
    cases["load alone"] = stagers[last].load
    return cases


def in_turns(cases: dict[str, Case], rounds: int, until_s: float) -> dict[str, list[Took]]:
    """What each case took in its rounds: at least one, not counting the first of all."""
    found: dict[str, list[Took]] = {name: [] for name in cases}
    for index in range(rounds + 1):
        began_s = time.monotonic()
        for name, case in cases.items():
            took = case()
            if index:
                found[name].append(took)
        now_s = time.monotonic()
        if index and now_s + (now_s - began_s) > until_s:
            break
    return found


def counted(stager: Stager, rounds: int) -> dict[str, Any]:
    """The phases of a fetch, summed over its threads, and what it took with counting."""
    phases, total, walls_s = Phases(), dict[str, Spent](), list[float]()
    with stager.counting(phases):
        for _ in range(rounds):
            walls_s.append(stager.stage().wall_s)
            for name, spent in phases.take().items():
                total.setdefault(name, Spent()).add(spent)
    total.pop(OUTSIDE, None)
    figures = {name: spent.figures(rounds) for name, spent in total.items()}
    return {"wall_ms": statistics.median(walls_s) * 1000, "phases": figures}


def medians(rounds: Sequence[Took], num_bytes: int) -> dict[str, float]:
    wall_s, user_s, system_s = (
        statistics.median(getattr(one, name) for one in rounds)
        for name in ("wall_s", "user_s", "system_s")
    )
    return {
        "wall_ms": round(wall_s * 1000, 3),
        "user_ms": round(user_s * 1000, 3),
        "system_ms": round(system_s * 1000, 3),
        "gb_per_s": round(num_bytes / wall_s / 1e9, 3),
        "rounds": len(rounds),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    until_s = time.monotonic() + options.seconds
    names = new_names("fetch", options.blocks)
    num_bytes = options.blocks * BLOCK_BYTES
    with scratch(options.store) as store, shared_folder() as folder, ExitStack() as opened:
        placed = write_store(store, names)
        in_memory = share_of_files_in_memory({path for path, _, _ in placed})
        # Room for the blocks twice: bare reads keep their slots.
        host = host_config(folder, 3 * num_bytes).model_copy(
            update={"reserve_ahead": 1, "populate": True}
        )
        opened.enter_context(owned(host))
        cases = opened.enter_context(bare_cases(host, names, placed))
        config, stagers = cache_config(host, store, saves=False), dict[int, Stager]()
        for threads in IO_THREADS:
            setting = config.model_copy(update={"io_threads": threads})
            pool = None
            if threads == max(IO_THREADS):
                pool = torch.zeros((len(names), BLOCK_BYTES), dtype=torch.uint8, device=device())
            stagers[threads] = Stager(setting, SPACE, names, pool)
            opened.callback(stagers[threads].close)
        found = in_turns({**cases, **stage_cases(stagers)}, options.rounds, until_s)
        traced = {str(n): counted(stager, 3) for n, stager in stagers.items()}
    return {
        "fetch": {name: medians(rounds, num_bytes) for name, rounds in found.items()},
        "phases": traced,
        "bytes": num_bytes,
        "share_in_page_cache": in_memory,
        "xxhash": xxhash.VERSION,
    }


def show(found: dict[str, Any]) -> None:
    """A line for each case; then the phases."""
    columns = ("wall_ms", "user_ms", "system_ms", "gb_per_s")
    print(f"{found['bytes'] >> 20} MiB; in the page cache: {found['share_in_page_cache']}")
    print(f"{'':44}" + "".join(f"{name:>11}" for name in columns))
    for name, one in found["fetch"].items():
        print(f"{name:44}" + "".join(f"{one[column]:11.2f}" for column in columns))
    for threads, one in found["phases"].items():
        title = f"stage, {threads} io_threads, counted: {one['wall_ms']:.1f} ms; all threads:"
        print_phases(title, one["phases"])


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    default = NUM_BLOCKS if device() == GPU else DRY_BLOCKS
    parser.add_argument("--store", type=Path, help="folder for the store (default: temporary)")
    parser.add_argument("--blocks", type=int, default=default, help="blocks of 4 MiB")
    parser.add_argument("--rounds", type=int, default=7, help="most rounds")
    parser.add_argument("--seconds", type=float, default=60, help="begin no round behind that")
    options = parser.parse_args()
    found = measure(options)
    show(found)
    report(found, options.json)


if __name__ == "__main__":
    main()
