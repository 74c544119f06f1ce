"""Objects are read in steps, several at once: every block is right, or the match ends before it."""

import itertools
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shared_cache import parallel
from shared_cache.media import local_medium, page_cache
from shared_cache.media.local_medium import USE_NOTED_S, LocalMedium
from shared_cache.media.medium import Reader
from shared_cache.stores import run_objects
from shared_cache.stores.fs_store import FsBlockStore, StoreFaults, open_store
from shared_cache.stores.store import BlockRun
from tests.shared_cache.arenas import await_true
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, run_of
from tests.shared_cache.store_contract import payloads_of, read_all

NUM_BLOCKS = 23
PLACES = ("memory", "memory, large blocks", "memory, blocks of one piece", "disk")


@pytest.fixture(params=["none", "shuffle-zstd"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FsBlockStore:
    return open_store(f"file://{tmp_path}", NAMESPACE, codec=request.param)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks a step, so that a short run takes several."""
    monkeypatch.setattr(run_objects, "STEP_IN_MEMORY_BYTES", 4 * BLOCK_BYTES)
    monkeypatch.setattr(local_medium._LocalReader, "step_bytes", 4 * BLOCK_BYTES)


def pretend(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """That all bytes lie in this place."""
    monkeypatch.setattr(page_cache, "share_in_memory", lambda *_: float(place != "disk"))
    if place == "memory, large blocks":
        monkeypatch.setattr(run_objects, "STEP_IN_MEMORY_BYTES", BLOCK_BYTES // 2)
        monkeypatch.setattr(run_objects, "PIECE_IN_MEMORY_BYTES", 24)
    if place == "memory, blocks of one piece":
        monkeypatch.setattr(run_objects, "STEP_IN_MEMORY_BYTES", BLOCK_BYTES // 2)
        monkeypatch.setattr(run_objects, "PIECE_IN_MEMORY_BYTES", BLOCK_BYTES)


def object_path(folder: Path) -> Path:
    (path,) = folder.rglob("*.arrow")
    return path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [0, 3, 4, 10, 21, 22])
def test_the_match_ends_before_a_bad_block(
    store: FsBlockStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    bad: int,
) -> None:
    pretend(monkeypatch, place)
    chain = chain_of(NUM_BLOCKS)
    store.write(run_of(chain))
    known = store._runs.known.find(chain.hashes[bad])
    assert known is not None
    path = object_path(tmp_path)
    data = bytearray(path.read_bytes())
    data[known.head.place_of(bad, 1, BLOCK_BYTES)[0] + 2] ^= 0x10
    path.write_bytes(data)
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes[:bad])
    assert store.faults == StoreFaults(corrupt=1, foreign=0, vanished=0)
    assert store.write(run_of(chain)) == NUM_BLOCKS
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


@pytest.mark.parametrize("place", PLACES)
def test_any_part_of_a_run_can_be_read(
    store: FsBlockStore, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    pretend(monkeypatch, place)
    hashes = chain_of(NUM_BLOCKS).hashes
    store.write(run_of(chain_of(NUM_BLOCKS)))
    for start, stop in itertools.combinations(range(NUM_BLOCKS + 1), 2):
        assert read_all(store, hashes[start:stop]) == payloads_of(hashes[start:stop])


@pytest.mark.usefixtures("one_helper")
@pytest.mark.parametrize("is_in_memory", [True, False])
def test_only_what_is_in_memory_is_read_by_several_threads_at_once(
    store: FsBlockStore, monkeypatch: pytest.MonkeyPatch, is_in_memory: bool
) -> None:
    """A disk or a network is asked in order, while what has come is being verified."""
    pretend(monkeypatch, "memory" if is_in_memory else "disk")
    starts: list[int] = []
    num_inside, most_inside = 0, 0
    lock, both = threading.Lock(), threading.Barrier(2)
    with store._medium.open("namespace.json") as reader:
        reader_type = type(reader)
    fill = reader_type.fill

    def watched(self: Reader, start: int, buffers: Sequence[memoryview]) -> int:
        nonlocal num_inside, most_inside
        with lock:
            starts.append(start)
            num_inside += 1
            most_inside = max(most_inside, num_inside)
        try:
            if is_in_memory and len(starts) <= 2:
                both.wait(10)
            return fill(self, start, buffers)
        finally:
            with lock:
                num_inside -= 1

    chain = chain_of(NUM_BLOCKS)
    store.write(run_of(chain))
    monkeypatch.setattr(reader_type, "fill", watched)
    helpers = parallel._helpers(os.getpid(), parallel._num_helpers(), "kvcommons-copy")
    await_true(lambda: not helpers.num_queued)  # none is asked while one stands in line still
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
    assert len(starts) == 6
    assert most_inside == (2 if is_in_memory else 1)
    if not is_in_memory:
        assert starts == sorted(starts)


def test_after_a_bad_step_no_more_are_fetched(
    store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "disk")
    monkeypatch.setattr("shared_cache.parallel._num_helpers", lambda: 0)
    chain = chain_of(NUM_BLOCKS)
    store.write(run_of(chain))
    os.truncate(object_path(tmp_path), 4096 + 1)
    num_fills = []
    with store._medium.open("namespace.json") as reader:
        reader_type = type(reader)
    fill = reader_type.fill

    def counted(self: Reader, start: int, buffers: Sequence[memoryview]) -> int:
        num_fills.append(start)
        return fill(self, start, buffers)

    monkeypatch.setattr(reader_type, "fill", counted)
    assert read_all(store, chain.hashes) == []
    assert len(num_fills) == 2  # it looks twice


@pytest.mark.parametrize("written", ["none", "shuffle-zstd"])
@pytest.mark.parametrize("reading", ["none", "shuffle-zstd"])
def test_every_codec_is_read_whatever_is_written(
    written: str, reading: str, tmp_path: Path
) -> None:
    first, second = chain_of(5), chain_of(9)
    for chain, codec in ((first, written), (second, reading)):
        open_store(f"file://{tmp_path}", NAMESPACE, codec=codec).write(run_of(chain))  # type: ignore[arg-type]
    reader = open_store(f"file://{tmp_path}", NAMESPACE, codec=reading)  # type: ignore[arg-type]
    assert read_all(reader, second.hashes) == payloads_of(second.hashes)


def test_checksums_that_came_with_a_run_are_stored_and_not_computed_again(tmp_path: Path) -> None:
    """So wrong ones make a miss, as damage does."""
    store, run = open_store(f"file://{tmp_path}", NAMESPACE), run_of(chain_of(3))
    forged = (1, 2, 3)
    store.write(BlockRun(run.parent, run.hashes, run.payloads, forged))
    (entry,) = store.entries()
    assert store._runs.known._heads[entry.name].checksums == forged
    assert read_all(store, run.hashes) == []


def test_another_format_version_is_a_miss_and_stays(tmp_path: Path) -> None:
    """A store that several versions of this program use at the same time."""
    store, chain = open_store(f"file://{tmp_path}", NAMESPACE), chain_of(3)
    store.write(run_of(chain))
    path = object_path(tmp_path)
    old = path.read_bytes().replace(b"\x01\0\0\x002\0\0\0", b"\x01\0\0\x003\0\0\0")
    assert old != path.read_bytes()
    path.write_bytes(old)
    fresh = open_store(f"file://{tmp_path}", NAMESPACE)
    assert read_all(fresh, chain.hashes) == []
    assert fresh.faults == StoreFaults(corrupt=0, foreign=1, vanished=0)
    assert path.read_bytes() == old


class TestUse:
    """Reading is noted, at most once an hour and only where that may be."""

    def age_object(self, folder: Path, age_s: float) -> Path:
        path = object_path(folder)
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    def test_a_read_makes_an_object_young(self, store: FsBlockStore, tmp_path: Path) -> None:
        store.write(run_of(chain_of(3)))
        self.age_object(tmp_path, USE_NOTED_S + 60)
        (entry,) = store.entries()
        assert time.time() - entry.used_s > USE_NOTED_S
        read_all(store, chain_of(3).hashes)
        (entry,) = store.entries()
        assert abs(time.time() - entry.used_s) < 60

    def test_a_second_one_within_the_hour_costs_nothing(
        self, store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(run_of(chain_of(3)))
        self.age_object(tmp_path, USE_NOTED_S - 60)
        monkeypatch.setattr(os, "utime", lambda *_: pytest.fail("noted"))
        assert len(read_all(store, chain_of(3).hashes)) == 3

    def test_a_time_in_the_future_is_mended(self, store: FsBlockStore, tmp_path: Path) -> None:
        store.write(run_of(chain_of(3)))
        path = self.age_object(tmp_path, -1e9)
        read_all(store, chain_of(3).hashes)
        assert abs(time.time() - path.stat().st_mtime) < 60

    def test_looking_without_reading_is_no_use(self, store: FsBlockStore, tmp_path: Path) -> None:
        store.write(run_of(chain_of(3)))
        path = self.age_object(tmp_path, USE_NOTED_S + 60)
        before_s = path.stat().st_mtime
        fresh = open_store(f"file://{tmp_path}", NAMESPACE)
        assert fresh.match(chain_of(3).hashes) == 3
        assert fresh.refresh() == 3
        list(fresh.entries())
        assert path.stat().st_mtime == before_s

    def test_a_disk_that_refuses_is_read_all_the_same(
        self, store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(run_of(chain_of(3)))
        self.age_object(tmp_path, USE_NOTED_S + 60)

        def refuse(*_: object) -> None:
            raise PermissionError("not yours")

        monkeypatch.setattr(os, "utime", refuse)
        assert read_all(store, chain_of(3).hashes) == payloads_of(chain_of(3).hashes)

    def test_who_only_looks_notes_nothing(self, store: FsBlockStore, tmp_path: Path) -> None:
        store.write(run_of(chain_of(3)))
        path = self.age_object(tmp_path, USE_NOTED_S + 60)
        before_s = path.stat().st_mtime
        looking = FsBlockStore(store._medium, NAMESPACE, store.url, read_only=True)
        assert len(read_all(looking, chain_of(3).hashes)) == 3
        assert path.stat().st_mtime == before_s


@pytest.mark.parametrize(("num_layers", "num_blocks"), [(4096, 40), (49000, 5)])
def test_blocks_of_real_sizes_are_in_the_right_slots(
    num_layers: int, num_blocks: int, tmp_path: Path
) -> None:
    """256 KiB, several of them a step, and 3 MB, each in pieces."""
    layout = replace(NAMESPACE.layout, num_layers=num_layers)
    namespace, size = replace(NAMESPACE, layout=layout), layout.block_bytes
    hashes = chain_of(num_blocks).hashes
    payloads = tuple(memoryview(os.urandom(size)) for _ in hashes)
    store = open_store(f"file://{tmp_path}", namespace)
    assert isinstance(store._medium, LocalMedium)
    assert (
        store.write(BlockRun(chain_of(num_blocks).parent_of(0), tuple(hashes), payloads))
        == num_blocks
    )
    pool = memoryview(bytearray((num_blocks + 1) * size))
    slots = [pool[i * size : (i + 1) * size] for i in range(num_blocks, -1, -1)]
    checksums = store.read_into(hashes, slots[:num_blocks])
    assert len(checksums) == num_blocks
    assert [bytes(slot) for slot in slots[:num_blocks]] == [bytes(payload) for payload in payloads]
    assert bytes(slots[num_blocks]) == bytes(size)
