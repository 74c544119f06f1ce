"""Finding blocks inside runs: by listing, by hints from others, and by writing side by side."""

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from shared_cache import fs_store
from shared_cache.errors import StoreFullError
from shared_cache.fs_store import open_store
from shared_cache.local_medium import LocalMedium
from shared_cache.medium import Medium
from tests.shared_cache import fake_file_systems
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, run_of
from tests.shared_cache.store_contract import payloads_of, read_all


@pytest.fixture(autouse=True)
def fake_protocols() -> Iterator[None]:
    with fake_file_systems.registered():
        yield


@pytest.fixture(params=["file", "faulty"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else f"faulty:///{uuid.uuid4().hex}"


class TestHints:
    def test_inner_blocks_are_found_by_a_hint(self, url: str) -> None:
        chain = chain_of(6)
        open_store(url, NAMESPACE).write(run_of(chain))
        fresh = open_store(url, NAMESPACE)
        assert fresh.match(chain.hashes[3:]) == 0
        fresh.learn(chain.hashes[0], chain.hashes[3:4])
        assert fresh.match(chain.hashes[3:]) == 3
        assert read_all(fresh, chain.hashes[3:]) == payloads_of(chain.hashes[3:])

    def test_a_hint_to_what_is_gone_is_a_miss_and_no_fault(self, url: str) -> None:
        chain = chain_of(6)
        store = open_store(url, NAMESPACE)
        store.learn(chain.hashes[0], chain.hashes)
        assert store.match(chain.hashes[2:]) == 0
        assert store.faults.vanished == 0
        store.write(run_of(chain).tail(2))
        assert store.match(chain.hashes[2:]) == 4

    def test_a_hint_reads_nothing(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        store = open_store(url, NAMESPACE)
        monkeypatch.setattr(store, "_medium", None)
        store.learn(chain_of(2).hashes[0], chain_of(2).hashes)


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


class TestWritingSeveralObjects:
    @pytest.fixture(autouse=True)
    def small_objects(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES)

    def test_they_are_of_nearly_equal_length(self, url: str) -> None:
        store = open_store(url, NAMESPACE)
        assert store.write(run_of(chain_of(9))) == 9
        assert sorted(len(entry.hashes) for entry in store.entries()) == [3, 3, 3]

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
