"""Finding blocks inside runs: by listing, by hints from others, and by writing side by side."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from shared_cache.errors import StoreError, StoreFullError
from shared_cache.media.local_medium import LocalMedium
from shared_cache.media.medium import Medium
from shared_cache.stores import fs_store, refreshing
from shared_cache.stores.fs_store import open_store
from shared_cache.stores.known_runs import KnownRuns
from shared_cache.stores.refreshing import Refresher
from tests.shared_cache import fake_file_systems
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, FakeClock, chain_of, run_of
from tests.shared_cache.store_contract import payloads_of, read_all


@pytest.fixture(autouse=True)
def fake_protocols() -> Iterator[None]:
    with fake_file_systems.registered():
        yield


@pytest.fixture(params=["file", "faulty"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else f"faulty:///{uuid.uuid4().hex}"


class TestLookingAhead:
    """A prefix in many objects is found without reading their heads one after the other."""

    def opened(self, store: fs_store.FsBlockStore, monkeypatch: pytest.MonkeyPatch) -> "Opened":
        opened = Opened(type(store._medium).open)
        monkeypatch.setattr(type(store._medium), "open", opened.open)
        return opened

    def test_objects_of_equal_length(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)
        chain = chain_of(4 * 12)
        open_store(url, NAMESPACE).write(run_of(chain))
        fresh = open_store(url, NAMESPACE)
        opened = self.opened(fresh, monkeypatch)
        assert fresh.match(chain.hashes) == 48
        assert len(opened.names) == len(set(opened.names)) == 12
        assert opened.most_at_once > 1
        assert fresh.match(chain.hashes) == 48
        assert len(opened.names) == 12

    @pytest.mark.parametrize("lengths", [(4, 4, 1, 4, 3), (1, 2, 3, 4), (4, 4, 4, 2)])
    def test_objects_of_other_lengths(
        self, lengths: tuple[int, ...], url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chain, writer, start = chain_of(sum(lengths)), open_store(url, NAMESPACE), 0
        for length in lengths:
            writer.write(run_of(chain).part(start, start + length))
            start += length
        fresh = open_store(url, NAMESPACE)
        opened = self.opened(fresh, monkeypatch)
        assert fresh.match(chain.hashes) == sum(lengths)
        assert fresh.match(chain.hashes[: sum(lengths) - 1]) == sum(lengths) - 1
        assert len(opened.names) <= len(lengths) + 4, "a wrong guess ends the guessing"

    @pytest.mark.parametrize("num_stored", [1, 2, 3])
    def test_where_a_prefix_ends_is_asked_once(
        self, num_stored: int, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Most prompts have a stored beginning and an end of their own."""
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)
        chain = chain_of(4 * 9)
        open_store(url, NAMESPACE).write(run_of(chain).part(0, 4 * num_stored))
        fresh = open_store(url, NAMESPACE)
        opened = self.opened(fresh, monkeypatch)
        assert fresh.match(chain.hashes) == 4 * num_stored
        assert len(opened.names) == len(set(opened.names))

    def test_objects_behind_one_that_is_met_in_its_middle(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)
        chain = chain_of(4 * 6)
        open_store(url, NAMESPACE).write(run_of(chain))
        fresh = open_store(url, NAMESPACE)
        assert fresh.match(chain.hashes[:4]) == 4
        opened = self.opened(fresh, monkeypatch)
        assert fresh.match(chain.hashes[3:]) == 21
        assert len(opened.names) == len(set(opened.names)) == 5

    def test_a_hole_ends_the_prefix(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)
        chain = chain_of(4 * 8)
        writer = open_store(url, NAMESPACE)
        writer.write(run_of(chain))
        (third,) = [one for one in writer.entries() if one.hashes[0] == chain.hashes[8]]
        writer.delete(third.name)
        assert open_store(url, NAMESPACE).match(chain.hashes) == 8

    def test_a_writer_believes_what_it_looked_at_itself(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is remembered is looked at again before a block is taken for stored."""
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)
        chain = chain_of(4 * 6)
        writer, other = (open_store(url, NAMESPACE) for _ in range(2))
        assert writer.write(run_of(chain)) == 24
        for entry in list(other.entries()):
            if entry.hashes[0] in (chain.hashes[8], chain.hashes[20]):
                other.delete(entry.name)
        assert writer.match(chain.hashes) == 24
        assert writer.write(run_of(chain)) >= 8
        assert open_store(url, NAMESPACE).match(chain.hashes) == 24

    def test_a_writer_finds_a_block_in_the_middle_of_an_object_that_it_knows(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is no object's first one, so looking for that by its name finds nothing."""
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)
        chain, writer = chain_of(4 * 4), open_store(url, NAMESPACE)
        for start, stop in ((0, 4), (7, 11), (4, 8), (11, 16)):  # block 8 is in the second
            writer.write(run_of(chain).part(start, stop))
        other = open_store(url, NAMESPACE)
        other.refresh()
        assert other.write(run_of(chain)) == 0


class Opened:
    """Objects that were opened, by name, and how many at the same time; each takes a moment."""

    def __init__(self, open_object: Callable[[Medium, str], object]) -> None:
        self.names: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._open_object = open_object
        self._lock = threading.Lock()

    @property
    def open(self) -> Callable[[Medium, str], object]:
        def noted(medium: Medium, name: str) -> object:
            with self._lock:
                self.names.append(name)
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
            time.sleep(0.01)
            try:
                return self._open_object(medium, name)
            finally:
                with self._lock:
                    self._now -= 1

        return noted


class TestRefresh:
    def test_inner_blocks_are_found_afterwards_without_reading_heads_twice(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chains = [chain_of(4, first_token=100 * number) for number in range(5)]
        writer = open_store(url, NAMESPACE)
        for chain in chains:
            writer.write(run_of(chain))
        fresh = open_store(url, NAMESPACE)
        assert fresh.match(chains[0].hashes) == 4
        opened: list[str] = []
        open_object = type(fresh._medium).open

        def counted(medium: Medium, name: str) -> object:
            opened.append(name)
            return open_object(medium, name)

        monkeypatch.setattr(type(fresh._medium), "open", counted)
        assert fresh.refresh() == 20
        assert len(opened) == 4
        assert fresh.refresh() == 20
        assert [fresh.match(chain.hashes[2:]) for chain in chains] == [2] * 5
        assert len(opened) == 4

    def test_what_others_deleted_is_forgotten(self, url: str) -> None:
        store, other = (open_store(url, NAMESPACE) for _ in range(2))
        kept, deleted = chain_of(3), chain_of(2, first_token=100)
        store.write(run_of(kept))
        store.write(run_of(deleted))
        for entry in list(other.entries()):
            if entry.hashes[0] == deleted.hashes[0]:
                other.delete(entry.name)
        assert store.match(deleted.hashes) == 2  # believed without a look
        assert store.refresh() == 3
        assert store.match(deleted.hashes) == 0
        assert store.faults.vanished == 0

    def test_a_store_that_fills_the_memory_for_it_is_not_listed(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(url, NAMESPACE)
        monkeypatch.setattr(store._runs, "known", KnownRuns(max_blocks=5))
        store.write(run_of(chain_of(4)))
        monkeypatch.setattr(store, "_medium", None)
        assert store.refresh() == 4

    def test_it_happens_by_itself_until_the_store_is_closed(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(refreshing, "FIRST_WITHIN_S", 0.01)
        chain = chain_of(6)
        open_store(url, NAMESPACE).write(run_of(chain))
        fresh, is_done = open_store(url, NAMESPACE), threading.Event()
        look_up = fresh._look_up

        def looked_up(names: Sequence[str]) -> None:
            look_up(names)
            is_done.set()

        monkeypatch.setattr(fresh, "_look_up", looked_up)
        assert fresh.match(chain.hashes[3:]) == 0
        fresh.refresh_in_background()
        assert is_done.wait(10)
        assert fresh.match(chain.hashes[3:]) == 3
        fresh.close()
        assert not fresh._refresher._thread.is_alive()

    def test_a_store_that_hangs_keeps_nobody_from_closing(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(refreshing, "FIRST_WITHIN_S", 0.01)
        monkeypatch.setattr(refreshing, "CLOSE_TIMEOUT_S", 0.05)
        store, is_hanging, go_on = open_store(url, NAMESPACE), threading.Event(), threading.Event()

        def hang(**_: object) -> list[object]:
            is_hanging.set()
            assert go_on.wait(10)
            return []

        monkeypatch.setattr(store._medium, "list", hang)
        store.refresh_in_background()
        assert is_hanging.wait(10)
        store.write(run_of(chain_of(2)))
        assert store.match(chain_of(2).hashes) == 2
        store.close()
        go_on.set()
        store._refresher._thread.join(10)
        assert not store._refresher._thread.is_alive()

    def test_a_slow_one_rests_longer_and_a_fault_ends_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits_s: list[float] = []
        clock = FakeClock()

        class Closing(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                waits_s.append(timeout or 0.0)
                return len(waits_s) == 4

        def refresh() -> None:
            clock.now_s += 30.0 if len(waits_s) == 1 else 0.001
            if len(waits_s) == 2:
                raise StoreError("the bucket is away")

        monkeypatch.setattr(refreshing.time, "monotonic", clock)
        refresher = Refresher(refresh)
        refresher._closing = Closing()
        refresher._work()
        assert waits_s[1] == 1500.0
        assert all(300 <= wait_s <= 900 for wait_s in waits_s[2:])
        assert refresher.num_faults == 1

    def test_what_was_used_last_is_known_when_not_all_can_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(f"file://{tmp_path}", NAMESPACE)
        chains = [chain_of(2, first_token=100 * number) for number in range(4)]
        for age, chain in enumerate(chains):
            store.write(run_of(chain))
            digits = chain.hashes[0].hex()
            (path,) = tmp_path.rglob(f"{digits}.arrow")
            os.utime(path, (1e9 - age, 1e9 - age))
        monkeypatch.setattr(fs_store, "REFRESH_OBJECTS", 2)
        fresh = open_store(f"file://{tmp_path}", NAMESPACE)
        assert fresh.refresh() == 4
        assert [fresh.match(chain.hashes[1:]) for chain in chains] == [1, 1, 0, 0]


class TestWritingWhatWasDeleted:
    def test_it_is_written_again_although_it_is_remembered(self, url: str) -> None:
        ours, others = (open_store(url, NAMESPACE) for _ in range(2))
        chain = chain_of(6)
        ours.write(run_of(chain).tail(3))
        assert ours.write(run_of(chain)) >= 3
        for entry in list(others.entries()):
            others.delete(entry.name)
        assert ours.write(run_of(chain)) == 6
        assert read_all(open_store(url, NAMESPACE), chain.hashes) == payloads_of(chain.hashes)
        assert ours.write(run_of(chain)) == 0
        assert ours.faults.vanished == 0


class TestWritingSeveralObjects:
    @pytest.fixture(autouse=True)
    def small_objects(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)

    def test_all_but_the_last_one_are_of_equal_length(self, url: str) -> None:
        store = open_store(url, NAMESPACE)
        assert store.write(run_of(chain_of(9))) == 9
        assert sorted(len(entry.hashes) for entry in store.entries()) == [1, 4, 4]

    @pytest.mark.usefixtures("one_helper")
    def test_they_are_written_at_the_same_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, both = open_store(f"file://{tmp_path}", NAMESPACE), threading.Barrier(2)
        publish = LocalMedium.publish

        def meet(
            medium: LocalMedium, name: str, parts: Sequence[memoryview], *, replace: bool = False
        ) -> bool:
            both.wait(10)
            return publish(medium, name, parts, replace=replace)

        monkeypatch.setattr(LocalMedium, "publish", meet)
        assert store.write(run_of(chain_of(8))) == 8

    def test_one_that_is_there_already_stays(self, tmp_path: Path) -> None:
        store, chain = open_store(f"file://{tmp_path}", NAMESPACE), chain_of(12)
        store.write(run_of(chain_of(6)).tail(4))
        (path,) = tmp_path.rglob("*.arrow")
        inode = path.stat().st_ino
        assert store.write(run_of(chain)) >= 10
        assert path.stat().st_ino == inode
        fresh = open_store(f"file://{tmp_path}", NAMESPACE)
        assert read_all(fresh, chain.hashes) == payloads_of(chain.hashes)

    def test_one_that_others_write_at_the_same_moment_is_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, chain = open_store(f"file://{tmp_path}", NAMESPACE), chain_of(12)
        other = open_store(f"file://{tmp_path}", NAMESPACE)
        publish = LocalMedium.publish

        def late(
            medium: LocalMedium, name: str, parts: Sequence[memoryview], *, replace: bool = False
        ) -> bool:
            if chain.hashes[4].hex() in name:
                with monkeypatch.context() as patch:
                    patch.setattr(LocalMedium, "publish", publish)
                    other.write(run_of(chain_of(6)).tail(4))
            return publish(medium, name, parts, replace=replace)

        monkeypatch.setattr(LocalMedium, "publish", late)
        assert store.write(run_of(chain)) >= 10
        fresh = open_store(f"file://{tmp_path}", NAMESPACE)
        assert fresh.match(chain.hashes) == 12
        assert read_all(fresh, chain.hashes) == payloads_of(chain.hashes)

    @pytest.mark.parametrize("failing", range(3))
    def test_one_that_fails_leaves_whole_objects_only(
        self, failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, chain = open_store(f"file://{tmp_path}", NAMESPACE), chain_of(12)
        publish: Callable[..., bool] = LocalMedium.publish

        def fail(
            medium: LocalMedium, name: str, parts: Sequence[memoryview], *, replace: bool = False
        ) -> bool:
            if chain.hashes[4 * failing].hex() in name:
                raise OSError(28, "No space left on device")
            return publish(medium, name, parts, replace=replace)

        with monkeypatch.context() as patch:
            patch.setattr(LocalMedium, "publish", fail)
            with pytest.raises(StoreFullError):
                store.write(run_of(chain))
        for reader in (store, open_store(f"file://{tmp_path}", NAMESPACE)):
            found = reader.match(chain.hashes)
            assert found % 4 == 0
            assert found <= 4 * failing
            assert read_all(reader, chain.hashes) == payloads_of(chain.hashes[:found])
        assert not list(tmp_path.rglob("*.tmp"))
        store.write(run_of(chain))
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
