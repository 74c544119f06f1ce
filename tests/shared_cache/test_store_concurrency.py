"""Threads and processes write and read the same runs at once: only good blocks are ever seen."""

import multiprocessing
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared_cache.hashing import BlockHashChain
from shared_cache.stores.fs_store import FsBlockStore, StoreFaults, open_store
from tests.shared_cache.fakes import LAYOUT, NAMESPACE, run_of
from tests.shared_cache.store_contract import payloads_of, read_all

NUM_PROMPTS = 12
SHARED_BLOCKS = 3
BLOCKS_PER_PROMPT = 10


def prompts() -> list[BlockHashChain]:
    """Prompts with a common beginning, of different lengths."""
    size = LAYOUT.tokens_per_block
    chains = []
    for prompt in range(NUM_PROMPTS):
        own_blocks = BLOCKS_PER_PROMPT - SHARED_BLOCKS - prompt % 3
        tokens = [1] * (SHARED_BLOCKS * size) + [100 + prompt] * (own_blocks * size)
        chains.append(BlockHashChain(size, tokens=tokens))
    return chains


def write_all(url: str, seed: int) -> None:
    """Write every prompt in an order of one's own, some of them in two halves, and read along."""
    store, order = open_store(url, NAMESPACE), prompts()
    random.Random(seed).shuffle(order)
    for chain in order:
        run = run_of(chain)
        if len(run.hashes) % 2 and seed % 2:
            store.write(run.tail(len(run.hashes) // 2))
        store.write(run)
        found = read_all(store, chain.hashes)
        assert found == payloads_of(chain.hashes[: len(found)])


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in `count` threads that begin together; raises what one of them raised."""
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        barrier.wait()
        work(index)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Threads take turns often, so that short runs interleave."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before_s)


def check_complete(store: FsBlockStore) -> None:
    for chain in prompts():
        assert store.match(chain.hashes) == len(chain.hashes)
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


def test_processes_and_threads_on_a_local_folder(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_all, args=(url, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    store, is_over = open_store(url, NAMESPACE), threading.Event()

    def read_along(_: int) -> None:
        while not is_over.is_set():
            for chain in prompts():
                found = read_all(store, chain.hashes)
                assert found == payloads_of(chain.hashes[: len(found)])

    with ThreadPoolExecutor(1) as readers:
        reading = readers.submit(in_threads, 2, read_along)
        try:
            in_threads(2, lambda index: write_all(url, 3 + index))
            for process in processes:
                process.join()
        finally:
            is_over.set()
        reading.result()
    assert [process.exitcode for process in processes] == [0, 0]
    fresh = open_store(url, NAMESPACE)
    check_complete(fresh)
    assert store.faults == fresh.faults == StoreFaults(corrupt=0, foreign=0, vanished=0)
    assert not list(tmp_path.rglob("*.tmp"))


def test_threads_share_one_store(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}", NAMESPACE)

    def work(index: int) -> None:
        order = prompts()
        random.Random(index).shuffle(order)
        for chain in order:
            store.write(run_of(chain))
            assert read_all(store, chain.hashes) == payloads_of(chain.hashes)

    in_threads(4, work)
    check_complete(store)
    check_complete(open_store(store.url, NAMESPACE))
    assert store.faults == StoreFaults(corrupt=0, foreign=0, vanished=0)


def test_writers_of_an_object_store_may_lose_a_race_but_nothing_gets_wrong() -> None:
    """There the last writer of one name wins; what others lost is a miss until written again."""
    url = "memory:///concurrency"
    in_threads(4, lambda index: write_all(url, index))
    store = open_store(url, NAMESPACE)
    for chain in prompts():
        found = read_all(store, chain.hashes)
        assert found == payloads_of(chain.hashes[: len(found)])
        assert len(found) >= SHARED_BLOCKS
        store.write(run_of(chain))
    check_complete(store)
    assert store.faults.corrupt == 0
