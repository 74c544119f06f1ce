"""The process that reads beside its replica: what it brings is right, and it may die any time."""

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_cache.checksum import block_checksum, checksum_seed
from shared_cache.config import CacheConfig, CostConfig
from shared_cache.hashing import BlockHash
from shared_cache.opening import open_cache
from shared_cache.readers.messages import Row
from shared_cache.readers.process import ReaderProcess, num_threads_for
from shared_cache.staging import SharedCache
from shared_cache.stores import run_objects
from shared_cache.stores.fs_store import open_store
from tests.shared_cache.arenas import (
    await_true,
    client_process,
    host_config,
    memory_folder,
    open_tier,
    running_owner,
)
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, payload_of, run_of

BIG = (2 << 20) + 4096  # two whole steps of the worker, and a part of one
NAMES = [BlockHash(bytes([number]) * 32) for number in range(6)]


@pytest.fixture
def reader() -> Iterator[ReaderProcess]:
    reader = ReaderProcess(2)
    await_true(lambda: reader.is_usable)
    yield reader
    reader.close()


class Memory:
    """A file that two processes map, and one with blocks to read."""

    def __init__(self, folder: Path) -> None:
        source = np.random.default_rng(5).integers(0, 256, (len(NAMES), BIG), np.uint8)
        self.blocks = [bytes(block) for block in source]
        (folder / "blocks").write_bytes(b"head" + b"".join(self.blocks))
        self.num_bytes = 8 * BIG
        (folder / "memory").write_bytes(bytes(self.num_bytes))
        self.file = os.open(folder / "blocks", os.O_RDONLY)
        self.shared = os.open(folder / "memory", os.O_RDWR)
        self.mapping = mmap.mmap(self.shared, self.num_bytes)

    def row(self, number: int, place: int) -> Row:
        name = NAMES[number]
        checksum = block_checksum(name, memoryview(self.blocks[number]))
        return 4 + number * BIG, place * BIG, BIG, checksum_seed(name), checksum

    def at(self, place: int) -> bytes:
        return self.mapping[place * BIG : (place + 1) * BIG]

    def number_in(self, reader: ReaderProcess) -> int:
        return reader.memory(b"arena", self.shared, self.num_bytes, populate=True)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    memory = Memory(tmp_path)
    yield memory
    os.close(memory.file)
    os.close(memory.shared)


def test_blocks_come_to_their_places(reader: ReaderProcess, memory: Memory) -> None:
    rows = [memory.row(number, 7 - number) for number in range(6)]
    assert reader.read(memory.number_in(reader), memory.file, rows)
    assert [memory.at(7 - number) for number in range(6)] == memory.blocks
    assert memory.at(0) == bytes(BIG)


def test_many_ask_at_once(reader: ReaderProcess, memory: Memory) -> None:
    def ask(number: int) -> None:
        for _ in range(20):
            row = memory.row(number, number)
            results.append(reader.read(memory.number_in(reader), memory.file, [row]))

    results: list[bool] = []
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 120
    assert [memory.at(number) for number in range(6)] == memory.blocks


@pytest.mark.parametrize("fault", ["another checksum", "cut short", "unreadable", "no such place"])
def test_what_is_not_right_is_said_to_be_missing(
    fault: str, reader: ReaderProcess, memory: Memory
) -> None:
    start, place, num_bytes, seed, checksum = memory.row(1, 1)
    file = memory.file
    if fault == "another checksum":
        checksum += 1
    elif fault == "cut short":
        start += 5 * BIG
    elif fault == "no such place":
        place = 8 * BIG
    else:
        file = os.open("/", os.O_RDONLY)
    rows = [memory.row(0, 0), (start, place, num_bytes, seed, checksum)]
    assert not reader.read(memory.number_in(reader), file, rows)
    if file != memory.file:
        os.close(file)
    assert reader.read(memory.number_in(reader), memory.file, [memory.row(2, 2)])
    assert memory.at(2) == memory.blocks[2]


def test_who_waits_for_a_process_that_dies_is_told(reader: ReaderProcess, memory: Memory) -> None:
    number, answers = memory.number_in(reader), list[bool]()
    os.kill(reader.pid, signal.SIGSTOP)
    ask = threading.Thread(
        target=lambda: answers.append(reader.read(number, memory.file, [memory.row(0, 0)]))
    )
    ask.start()
    os.kill(reader.pid, signal.SIGKILL)
    ask.join(10)
    assert answers == [False]
    assert not reader.is_usable
    assert not reader.read(number, memory.file, [memory.row(0, 0)])


def test_it_ends_with_its_replica(reader: ReaderProcess) -> None:
    reader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(reader.pid, 0)
    assert not reader.is_usable


@pytest.mark.parametrize(
    ("wanted", "num_cores", "threads"), [(None, 4, 0), (None, 12, 12), (None, 64, 16), (3, 2, 3)]
)
def test_it_needs_cores(wanted: int | None, num_cores: int, threads: int) -> None:
    assert num_threads_for(wanted, num_cores) == threads


class Counted:
    """Counts what reader processes are asked, and what they bring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[bool] = []
        read = ReaderProcess.read

        def counted(*args: Any) -> bool:
            self.answers.append(read(*args))
            return self.answers[-1]

        monkeypatch.setattr(ReaderProcess, "read", counted)


CHAIN = chain_of(40)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What readers are asked by the caches of a test, whose small blocks count as worth it."""
    monkeypatch.setattr(run_objects, "MIN_BYTES_OUTSIDE", BLOCK_BYTES)
    monkeypatch.setattr("shared_cache.media.page_cache.share_in_memory", lambda *_: 1.0)
    return Counted(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path, asked: Counted) -> Iterator[SharedCache]:
    """A cache over a file store with `CHAIN`, which has a reader."""
    url = f"file://{tmp_path}/store"
    open_store(url, NAMESPACE, {}).write(run_of(CHAIN))
    with memory_folder() as folder, running_owner(host_config(folder)):
        host = host_config(folder, reader_threads=2, reserve_ahead=1)
        config = CacheConfig(store=url, host=host, cost=CostConfig(gate=False))
        cache = open_cache(config, NAMESPACE)
        try:
            assert reader_of(cache) is None
            assert staged_right(cache)  # and a reader is started, as it would have been of use
            assert not asked.answers
            await_true(lambda: reader_of(cache) is not None and reader_of(cache).is_usable)
            yield cache
        finally:
            cache.close()


def reader_of(cache: SharedCache) -> Any:
    host: Any = cache.host
    return host._session._reader._process


def staged_right(cache: SharedCache) -> bool:
    """Stage all blocks and forget them again; whether all came and were right."""
    staged = cache.stage(CHAIN.hashes)
    found = [bytes(cache.host.buffer(slot)) for slot in staged.lease.slots]
    fetched = len(staged.fetched)
    cache.release(staged)
    await_true(lambda: cache.host.drop(CHAIN.hashes) or True)
    return fetched == 40 and found == [payload_of(name) for name in CHAIN.hashes]


def test_a_cache_reads_through_it_and_without_it(cache: SharedCache, asked: Counted) -> None:
    assert staged_right(cache)
    assert asked.answers
    assert all(asked.answers)
    os.kill(reader_of(cache).pid, signal.SIGKILL)
    assert staged_right(cache)
    await_true(lambda: not reader_of(cache).is_usable)
    num_asked = len(asked.answers)
    assert staged_right(cache)
    assert len(asked.answers) == num_asked


def test_a_damaged_block_is_found_by_who_asked(
    cache: SharedCache, asked: Counted, tmp_path: Path
) -> None:
    """What the process refuses is read again here: so it counts, and the object is removed."""
    (path,) = (tmp_path / "store").rglob("*.arrow")
    content = bytearray(path.read_bytes())
    content[content.index(payload_of(CHAIN.hashes[-1]))] ^= 1
    path.write_bytes(content)
    staged = cache.stage(CHAIN.hashes)
    assert 0 < staged.num_blocks < 40
    assert False in asked.answers
    assert cache.stats().tiers[0].corrupt_objects == 1
    assert not path.exists()
    cache.release(staged)


def test_none_is_started_for_blocks_that_are_not_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: SharedCache, asked: Counted
) -> None:
    monkeypatch.setattr("shared_cache.media.page_cache.share_in_memory", lambda *_: None)
    assert staged_right(cache)
    assert not asked.answers


def test_a_killed_clients_slots_are_given_to_nobody_while_its_reader_may_write() -> None:
    with memory_folder() as folder, running_owner(host_config(folder)):
        config = host_config(folder, reserve_ahead=1)
        with (
            open_tier(config) as watcher,
            client_process(host_config(folder), "hold_with_reader") as client,
        ):
            said = client.report()
            os.kill(said["reader"], signal.SIGSTOP)
            client.close()
            time.sleep(0.3)  # the owner looks after the dead every 50 ms
            assert watcher.stats().leased_slots == 8
            os.kill(said["reader"], signal.SIGCONT)
            await_true(lambda: watcher.stats().leased_slots == 0)
