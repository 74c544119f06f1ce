"""The process that reads beside its replica: what it brings is right, and it may die any time."""

import errno
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_cache.checksum import block_checksum, checksum_seed
from shared_cache.config import CacheConfig, CostConfig
from shared_cache.hashing import BlockHash
from shared_cache.media.local_medium import LocalMedium
from shared_cache.opening import open_cache
from shared_cache.readers.messages import Row
from shared_cache.readers.process import ReaderProcess, num_threads_for
from shared_cache.staging import SharedCache
from shared_cache.stores import fs_store, run_objects
from shared_cache.stores.fs_store import open_store
from tests.shared_cache.arenas import (
    WAIT_S,
    await_true,
    client_process,
    host_config,
    memory_folder,
    open_tier,
    paths_of,
    running_owner,
)
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, payload_of, run_of

BIG = (2 << 20) + 4096  # two whole steps of the worker, and a part of one
SMALL = 64
NAMES = [BlockHash(bytes([number]) * 32) for number in range(6)]


@pytest.fixture
def reader() -> Iterator[ReaderProcess]:
    reader = ReaderProcess(2)
    reader.start()
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

    def small_row(self, place: int) -> Row:
        """The first bytes of the first block, to the `place`th place of so many bytes."""
        name = NAMES[0]
        checksum = block_checksum(name, memoryview(self.blocks[0][:SMALL]))
        return 4, place * SMALL, SMALL, checksum_seed(name), checksum

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
    assert reader.begin(memory.number_in(reader), memory.file, rows)()
    assert [memory.at(7 - number) for number in range(6)] == memory.blocks
    assert memory.at(0) == bytes(BIG)


def test_many_ask_at_once(reader: ReaderProcess, memory: Memory) -> None:
    def ask(number: int) -> None:
        for _ in range(20):
            row = memory.row(number, number)
            results.append(reader.begin(memory.number_in(reader), memory.file, [row])())

    results: list[bool] = []
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 120
    assert [memory.at(number) for number in range(6)] == memory.blocks


FAULTS = ["another checksum", "cut short", "unreadable", "no such place", "no number of a place"]


@pytest.mark.parametrize("fault", FAULTS)
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
    elif fault == "no number of a place":
        start = 1 << 63
    else:
        file = os.open("/", os.O_RDONLY)
    rows = [memory.row(0, 0), (start, place, num_bytes, seed, checksum)]
    assert not reader.begin(memory.number_in(reader), file, rows)()
    if file != memory.file:
        os.close(file)
    assert reader.begin(memory.number_in(reader), memory.file, [memory.row(2, 2)])()
    assert memory.at(2) == memory.blocks[2]


def asked_a_stopped_one(reader: ReaderProcess, memory: Memory) -> "Future[bool]":
    """A read that is under way in a process that does nothing."""
    number = memory.number_in(reader)
    assert reader.begin(number, memory.file, [memory.row(0, 0)])()  # the memory is known there
    os.kill(reader.pid, signal.SIGSTOP)
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(reader.begin(number, memory.file, [memory.row(0, 0)]))
    pool.shutdown(wait=False)
    await_true(lambda: reader._calls)
    return answer


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def long_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine, too, nobody is taken to hang who was stopped for a moment."""
    monkeypatch.setattr("shared_cache.readers.process.HANGS_S", 10 * WAIT_S)


@pytest.mark.usefixtures("long_patience")
def test_who_waits_for_a_process_that_dies_is_told(reader: ReaderProcess, memory: Memory) -> None:
    answer = asked_a_stopped_one(reader, memory)
    os.kill(reader.pid, signal.SIGKILL)
    assert answer.result(WAIT_S) is False
    assert not reader.is_usable
    assert not reader.begin(memory.number_in(reader), memory.file, [memory.row(0, 0)])()


def test_one_that_hangs_is_ended_before_its_caller_goes_on(
    reader: ReaderProcess, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared_cache.readers.process.HANGS_S", 0.2)
    answer = asked_a_stopped_one(reader, memory)
    assert answer.result(WAIT_S) is False
    assert not is_alive(reader.pid)
    assert reader.ended_s is not None


@pytest.mark.usefixtures("long_patience")
def test_closing_ends_one_that_hangs(reader: ReaderProcess, memory: Memory) -> None:
    answer = asked_a_stopped_one(reader, memory)
    reader.close()
    assert answer.result(WAIT_S) is False
    assert not is_alive(reader.pid)


@pytest.mark.usefixtures("long_patience")
def test_more_than_the_socket_takes_is_refused_at_once(
    reader: ReaderProcess, memory: Memory
) -> None:
    number, row = memory.number_in(reader), memory.small_row(0)
    answer = asked_a_stopped_one(reader, memory)
    with ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(reader.begin(number, memory.file, [row] * 1000)) for _ in range(64)]
        refused = next(as_completed(asked, WAIT_S))
        assert refused.result() is False
        assert reader.is_usable  # the others wait still
        os.kill(reader.pid, signal.SIGCONT)
        assert answer.result(WAIT_S) is True
    assert any(one.result() for one in asked)


def test_many_rows_travel_in_several_messages(reader: ReaderProcess, memory: Memory) -> None:
    rows = [memory.small_row(number) for number in range(5000)]
    assert reader.begin(memory.number_in(reader), memory.file, rows)()
    assert memory.mapping[: 5000 * SMALL] == 5000 * memory.blocks[0][:SMALL]


def test_each_memory_is_itself_and_can_be_forgotten(
    reader: ReaderProcess, tmp_path: Path, memory: Memory
) -> None:
    (tmp_path / "other").mkdir()
    other = Memory(tmp_path / "other")
    first = memory.number_in(reader)
    second = reader.memory(b"other", other.shared, other.num_bytes, populate=False)
    assert reader.begin(second, memory.file, [memory.row(1, 3)])()
    assert (other.at(3), memory.at(3)) == (memory.blocks[1], bytes(BIG))
    assert reader.begin(first, memory.file, [memory.row(2, 3)])()
    assert (other.at(3), memory.at(3)) == (memory.blocks[1], memory.blocks[2])
    reader.forget(b"other")
    assert not reader.begin(second, memory.file, [memory.row(2, 3)])()
    assert str(tmp_path / "other") not in Path(f"/proc/{reader.pid}/maps").read_text()
    assert reader.begin(first, memory.file, [memory.row(0, 3)])()
    assert reader.memory(b"other", other.shared, other.num_bytes, populate=False) not in (
        first,
        second,
    )
    os.close(other.file)
    os.close(other.shared)


def test_the_terminals_interrupt_is_for_the_replica(reader: ReaderProcess, memory: Memory) -> None:
    number = memory.number_in(reader)
    assert reader.begin(number, memory.file, [memory.row(0, 0)])()
    os.kill(reader.pid, signal.SIGINT)
    assert reader.begin(number, memory.file, [memory.row(1, 1)])()
    assert os.getpgid(reader.pid) != os.getpgid(0)


def test_it_ends_with_its_replica(reader: ReaderProcess) -> None:
    reader.close()
    assert not is_alive(reader.pid)
    assert not reader.is_usable


@pytest.mark.parametrize(
    ("wanted", "num_cores", "threads"), [(None, 4, 0), (None, 12, 9), (None, 64, 16), (3, 2, 3)]
)
def test_it_needs_cores(wanted: int | None, num_cores: int, threads: int) -> None:
    assert num_threads_for(wanted, num_cores) == threads


class Counted:
    """Counts what reader processes are asked, and what they bring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[bool] = []
        self.most_at_once = 0
        self._num_running = 0
        begin = ReaderProcess.begin

        def counted(*args: Any) -> Callable[[], bool]:
            is_done = begin(*args)
            self._num_running += 1
            self.most_at_once = max(self.most_at_once, self._num_running)

            def answer() -> bool:
                self.answers.append(is_done())
                self._num_running -= 1
                return self.answers[-1]

            return answer

        monkeypatch.setattr(ReaderProcess, "begin", counted)


CHAIN = chain_of(40)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What readers are asked by the caches of a test, whose small blocks count as worth it."""
    monkeypatch.setattr(fs_store, "MIN_BYTES_OUTSIDE", BLOCK_BYTES)
    monkeypatch.setattr(run_objects, "MIN_BLOCK_BYTES_OUTSIDE", BLOCK_BYTES)
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
    dropped: list[int] = []
    await_true(lambda: dropped.append(cache.host.drop(CHAIN.hashes)) or sum(dropped) == 40)
    return fetched == 40 and found == [payload_of(name) for name in CHAIN.hashes]


def test_a_cache_reads_through_it_and_without_it(
    cache: SharedCache, asked: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert staged_right(cache)
    assert asked.answers
    assert all(asked.answers)
    os.kill(reader_of(cache).pid, signal.SIGKILL)
    assert staged_right(cache)
    await_true(lambda: not reader_of(cache).is_usable)
    num_asked = len(asked.answers)
    assert staged_right(cache)
    assert len(asked.answers) == num_asked
    monkeypatch.setattr("shared_cache.host.arena_reader.RESTART_S", 0.0)
    assert staged_right(cache)
    await_true(lambda: reader_of(cache) is not None and reader_of(cache).is_usable)
    assert staged_right(cache)
    assert asked.answers[num_asked:]
    assert all(asked.answers[num_asked:])


@pytest.fixture
def several_objects(cache: SharedCache, tmp_path: Path) -> list[Path]:
    """The store of `cache`, where each object has five blocks only; the last one is the last."""
    folder = tmp_path / "store"
    assert cache.shared_store is not None
    assert cache.shared_store.forget(CHAIN.hashes) == 1
    for start in range(0, 40, 5):
        store = open_store(folder.as_uri(), NAMESPACE, {})
        store.write(run_of(CHAIN).part(start, start + 5))
        store.close()
    return sorted(folder.rglob("*.arrow"), key=lambda path: path.stat().st_mtime_ns)


def whole_piece(cache: SharedCache, several: list[Path]) -> tuple[int, bool]:
    """Read all blocks at once: how many came, and whether those are right."""
    assert len(several) == 8
    store, slots = cache.shared_store, cache.host.claim(CHAIN.hashes, 0.0).slots
    assert store is not None
    assert store.match(CHAIN.hashes) == 40
    buffers = [cache.host.buffer(slot) for slot in slots]
    num_good = len(store.read_into(CHAIN.hashes, buffers))
    wanted = [payload_of(name) for name in CHAIN.hashes[:num_good]]
    are_right = [bytes(buffer) for buffer in buffers[:num_good]] == wanted
    cache.host.cancel(slots)
    return num_good, are_right


def test_several_objects_are_read_at_once(
    cache: SharedCache, asked: Counted, several_objects: list[Path]
) -> None:
    asked.most_at_once = 0
    assert whole_piece(cache, several_objects) == (40, True)
    assert asked.most_at_once == 8
    assert all(asked.answers)


def test_what_follows_an_object_that_is_on_disk_is_read_by_it_all_the_same(
    cache: SharedCache,
    asked: Counted,
    several_objects: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = iter([1.0, 0.0, 0.0])  # the second one, asked for once more by who reads it here
    monkeypatch.setattr(
        "shared_cache.media.page_cache.share_in_memory", lambda *_: next(shares, 1.0)
    )
    assert whole_piece(cache, several_objects) == (40, True)
    assert asked.answers == [True] * 7


def test_descriptors_that_run_out_are_no_fault_of_the_store(
    cache: SharedCache,
    asked: Counted,
    several_objects: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who reads one object at a time needs fewer of them."""
    opened, num_open, most = LocalMedium.open, 0, 3

    @contextmanager
    def counted(medium: LocalMedium, name: str) -> Iterator[Any]:
        nonlocal num_open
        if num_open == most:
            raise OSError(errno.EMFILE, "too many open files")
        num_open += 1
        try:
            with opened(medium, name) as reader:
                yield reader
        finally:
            num_open -= 1

    monkeypatch.setattr(LocalMedium, "open", counted)
    assert whole_piece(cache, several_objects) == (40, True)
    assert cache.stats().store_faults == 0
    most = 1
    assert whole_piece(cache, several_objects) == (40, True)


def test_more_objects_than_may_be_open_are_read_in_turns(
    cache: SharedCache,
    asked: Counted,
    several_objects: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_objects, "OBJECTS_AT_ONCE", 3)
    asked.most_at_once = 0
    assert whole_piece(cache, several_objects) == (40, True)
    assert asked.most_at_once == 3
    assert asked.answers == [True] * 8


def test_a_reader_that_may_open_no_more_files_says_so(
    reader: ReaderProcess, memory: Memory
) -> None:
    number = memory.number_in(reader)
    assert reader.begin(number, memory.file, [memory.row(0, 0)])()
    before = resource.prlimit(reader.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(reader.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    assert not reader.begin(number, memory.file, [memory.row(0, 0)])()
    resource.prlimit(reader.pid, resource.RLIMIT_NOFILE, before)
    assert reader.begin(number, memory.file, [memory.row(0, 0)])()


@pytest.mark.parametrize("fault", ["damaged", "gone", "cut short", "on disk"])
def test_of_several_objects_those_before_a_bad_one_count(
    fault: str,
    cache: SharedCache,
    asked: Counted,
    several_objects: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, store = several_objects[5], cache.shared_store
    assert store is not None
    assert store.match(CHAIN.hashes) == 40
    if fault == "damaged":
        content = bytearray(path.read_bytes())
        content[content.index(payload_of(CHAIN.hashes[27]))] ^= 1
        path.write_bytes(content)
    elif fault == "gone":
        path.unlink()
    elif fault == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    else:
        shares = iter([1.0] * 5)
        monkeypatch.setattr(
            "shared_cache.media.page_cache.share_in_memory", lambda *_: next(shares, 0.0)
        )
    monkeypatch.setattr(store, "match", lambda hashes: 40)  # what was looked up before
    num_good, are_right = whole_piece(cache, several_objects)
    assert are_right
    assert num_good == {"damaged": 27, "gone": 25, "on disk": 40}.get(fault, num_good)
    assert 25 <= num_good <= 40
    assert asked.answers.count(True) >= 5


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


def test_it_is_not_asked_for_blocks_that_are_not_in_the_page_cache(
    monkeypatch: pytest.MonkeyPatch, cache: SharedCache, asked: Counted
) -> None:
    monkeypatch.setattr("shared_cache.media.page_cache.share_in_memory", lambda *_: None)
    assert staged_right(cache)
    assert not asked.answers


def arenas_mapped_by(process: int) -> list[str]:
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return [line for line in lines if ".arena" in line]


def test_an_arena_that_was_replaced_is_read_into_no_more(tmp_path: Path, asked: Counted) -> None:
    """What the process brings lies in the new arena, and it lets go of the old one."""
    url = f"file://{tmp_path}/store"
    open_store(url, NAMESPACE, {}).write(run_of(CHAIN))
    with memory_folder() as folder:
        host = host_config(folder, reader_threads=2, reserve_ahead=1)
        config = CacheConfig(store=url, host=host, cost=CostConfig(gate=False))
        with running_owner(host):
            cache = open_cache(config, NAMESPACE)
            assert staged_right(cache)
            await_true(lambda: reader_of(cache) is not None and reader_of(cache).is_usable)
            assert staged_right(cache)
            boot = cache.host._session.arenas[0].boot  # type: ignore[attr-defined]
        with running_owner(host):
            await_true(lambda: cache.host._session.arenas[0].boot != boot)  # type: ignore[attr-defined]
            await_true(lambda: cache.host.stats().is_connected)
            num_asked = len(asked.answers)
            await_true(lambda: staged_right(cache))
            assert True in asked.answers[num_asked:]
            await_true(lambda: len(arenas_mapped_by(reader_of(cache).pid)) == 1)
            cache.close()


FORK = """
import os, sys, time
from pathlib import Path
from shared_cache.readers import process
from tests.shared_cache import arena_clients, arenas

start = process._start
def start_and_fork(*arguments):  # the worst moment: it runs, and nobody has been told
    started = start(*arguments)
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    return started
process._start = start_and_fork
with arenas.open_tier(arenas.host_config(Path(sys.argv[1]), reader_threads=1)) as tier:
    arena_clients.hold_with_reader(tier, 0)
"""


def test_a_forked_child_does_not_keep_the_reader_of_its_parent_alive() -> None:
    with memory_folder() as folder, running_owner(host_config(folder)):
        client = subprocess.Popen(
            [sys.executable, "-c", FORK, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        assert client.stdout is not None
        try:
            reader = json.loads(client.stdout.readline())["reader"]
            client.kill()
            await_true(lambda: not is_alive(reader))
        finally:
            os.killpg(client.pid, signal.SIGKILL)  # the child, too
            client.wait(WAIT_S)
            client.stdout.close()
            client.stdin.close()  # type: ignore[union-attr]


def test_a_client_file_that_was_made_anew_is_held_by_the_reader_too() -> None:
    with memory_folder() as folder, running_owner(host_config(folder)):
        config = host_config(folder, reserve_ahead=1)
        with (
            open_tier(config) as watcher,
            client_process(host_config(folder), "hold_with_reader") as client,
        ):
            said = client.report()
            files = paths_of(config).clients
            number = str(client.process.pid)
            (mine,) = (path for path in files.iterdir() if path.read_text() == number)
            before = mine.stat().st_ino
            mine.unlink()
            await_true(lambda: mine.exists() and mine.read_text() == number)
            assert mine.stat().st_ino != before
            await_true(lambda: held_by(said["reader"], mine))
            os.kill(said["reader"], signal.SIGSTOP)
            client.close()
            time.sleep(0.3)
            assert watcher.stats().leased_slots == 8
            os.kill(said["reader"], signal.SIGCONT)
            await_true(lambda: watcher.stats().leased_slots == 0)


def held_by(process: int, path: Path) -> bool:
    files = Path(f"/proc/{process}/fd").iterdir()
    return any(os.path.samestat(file.stat(), path.stat()) for file in files if file.exists())


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
