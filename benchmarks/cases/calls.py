"""What the arena's owner and its clients do without moving bytes: stage, match, many callers."""

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cases.arena import (
    copier,
    host_config,
    namespace,
    opened,
    owned,
    save,
    shared_folder,
)
from benchmarks.cases.rounds import TURN_BLOCKS, Payload, new_names
from benchmarks.rivals.workload import PREFIX_BLOCKS
from shared_cache.hashing import BlockHash
from shared_cache.staging import SharedCache

STAGED_BLOCKS = 512
SIZE = "720KiB"
NUM_CLIENTS = 2
SETTLE_S = 0.005
"""Between two stages, so that the release of the one before has reached the owner."""


def measure_calls(num_tries: int, seconds: float) -> dict[str, float]:
    """The figures, with the issue's names."""
    block_bytes = namespace(SIZE).layout.block_bytes
    with ExitStack() as stack:
        folder = stack.enter_context(shared_folder())
        host = host_config(folder, 2 * STAGED_BLOCKS * block_bytes)
        stack.enter_context(owned(host))
        cache = stack.enter_context(opened(host, namespace(SIZE)))
        names = new_names("stage", STAGED_BLOCKS)
        _save_all(cache, names)
        stage_ms = _stage_ms(cache, names, num_tries)
        match_us, both_us = _match_us(cache, names, num_tries)
        return {
            "stage_512_ms": stage_ms,
            "match_us_per_block": match_us,
            "stage_calls_per_s": _calls_per_s(folder, names, seconds),
            "match_and_release_us_per_block": both_us,
        }


def _save_all(cache: SharedCache, names: Sequence[BlockHash]) -> None:
    payload = Payload(namespace(SIZE).layout.block_bytes, TURN_BLOCKS)
    source = copier(payload.source)
    for start in range(0, len(names), TURN_BLOCKS):
        save(cache, names[start : start + TURN_BLOCKS], source, range(TURN_BLOCKS))


def _stage_ms(cache: SharedCache, names: Sequence[BlockHash], num_tries: int) -> float:
    """Median time to stage all blocks, when this process has none of them leased."""
    took_s = []
    for _ in range(num_tries):
        time.sleep(SETTLE_S)
        started_s = time.perf_counter()
        staged = cache.stage(names)
        took_s.append(time.perf_counter() - started_s)
        _expect(staged.num_blocks, len(names))
        cache.release(staged)
    return statistics.median(took_s) * 1e3


def _match_us(
    cache: SharedCache, names: Sequence[BlockHash], num_tries: int
) -> tuple[float, float]:
    """Median time per block of the look-up in the step, and with the release that follows."""
    staged = cache.stage(names)
    match_s, both_s = [], []
    for _ in range(num_tries):
        started_s = time.perf_counter()
        lease = cache.host.lease_held(names)
        matched_s = time.perf_counter()
        cache.host.release(lease)
        ended_s = time.perf_counter()
        _expect(len(lease.slots), len(names))
        match_s.append(matched_s - started_s)
        both_s.append(ended_s - started_s)
    cache.release(staged)
    per_block = 1e6 / len(names)
    return statistics.median(match_s) * per_block, statistics.median(both_s) * per_block


def _calls_per_s(folder: Path, names: Sequence[BlockHash], seconds: float) -> float:
    """Leases of 64 blocks, each given back, by several processes at once, as fast as they can."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        ready = context.Barrier(NUM_CLIENTS)
        results = context.Queue()
        args = (str(folder), tuple(names), seconds, ready, results)
        clients = [context.Process(target=call_owner, args=args) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
            stack.callback(client.join)
            stack.callback(client.terminate)
        return sum(results.get(timeout=60 + 2 * seconds) for _ in clients)


def call_owner(
    folder: str, names: tuple[BlockHash, ...], seconds: float, ready: Any, results: Any
) -> None:
    """One client process; puts its calls per second into `results`."""
    host = host_config(Path(folder), 2 * STAGED_BLOCKS * namespace(SIZE).layout.block_bytes)
    prefixes = [
        names[start : start + PREFIX_BLOCKS] for start in range(0, len(names), PREFIX_BLOCKS)
    ]
    with opened(host, namespace(SIZE)) as cache:
        ready.wait(60)
        num_calls, started_s = 0, time.perf_counter()
        while (took_s := time.perf_counter() - started_s) < seconds:
            lease = cache.host.lease(prefixes[num_calls % len(prefixes)])
            _expect(len(lease.slots), PREFIX_BLOCKS)
            cache.host.release(lease)
            num_calls += 1
        results.put(num_calls / took_s)


def _expect(num_blocks: int, expected: int) -> None:
    if num_blocks != expected:
        raise SystemExit(f"{num_blocks} of {expected} blocks were found")
