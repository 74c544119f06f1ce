"""Spare files: reuse never shows a reader foreign bytes, and never touches anybody else's file."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.errors import StoreFullError
from shared_cache.media import local_medium, spares
from shared_cache.media.local_medium import LocalMedium
from shared_cache.media.spares import (
    STALE_SPARE_S,
    SpareFiles,
    best_fit,
    file_system_of,
    spare_bytes_of,
)
from shared_cache.stores.fs_store import FsBlockStore, StoreFaults, open_store
from shared_cache.upkeep.whole_store import WholeStore
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, run_of
from tests.shared_cache.store_contract import payloads_of, read_all

MANY_BYTES = 1 << 20


def open_recycling(folder: Path, spare_bytes: int = MANY_BYTES) -> FsBlockStore:
    return open_store(f"file://{folder}", NAMESPACE, spare_bytes=spare_bytes)


def delete_all(store: FsBlockStore) -> None:
    for entry in list(store.entries()):
        store.delete(entry.name)


def files(folder: Path, pattern: str) -> dict[int, Path]:
    """By inode."""
    return {path.stat().st_ino: path for path in folder.rglob(pattern)}


@pytest.fixture
def store(tmp_path: Path) -> FsBlockStore:
    assert file_system_of(str(tmp_path)) in spares._LOCAL_SYSTEMS, "these tests need a local disk"
    return open_recycling(tmp_path)


def test_a_deleted_file_is_the_next_ones(store: FsBlockStore, tmp_path: Path) -> None:
    old, new = chain_of(5), chain_of(3, first_token=70)
    store.write(run_of(old))
    before = files(tmp_path, "*.arrow")
    delete_all(store)
    assert files(tmp_path, "spare/*").keys() == before.keys()
    assert store.match(old.hashes) == 0
    assert store.write(run_of(new)) == 3
    assert files(tmp_path, "*.arrow").keys() == before.keys()
    assert not files(tmp_path, "spare/*")
    assert read_all(open_recycling(tmp_path), new.hashes) == payloads_of(new.hashes)


@pytest.mark.parametrize("lengths", [(9, 3), (3, 9), (4, 4), (100, 120), (120, 100)])
def test_a_recycled_file_is_as_long_as_its_object(
    store: FsBlockStore, tmp_path: Path, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "_MAX_WASTE", 1000)
    old, new = chain_of(lengths[0]), chain_of(lengths[1], first_token=5000)
    store.write(run_of(old))
    delete_all(store)
    store.write(run_of(new))
    plain = open_store(f"file://{tmp_path}/plain", NAMESPACE)
    plain.write(run_of(new))
    (recycled,), (fresh,) = (
        list(tmp_path.glob(f"{root}v2/*/*/*.arrow")) for root in ("", "plain/")
    )
    assert recycled.read_bytes() == fresh.read_bytes()


def test_without_a_budget_deleted_files_are_given_back(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}", NAMESPACE)
    store.write(run_of(chain_of(3)))
    delete_all(store)
    assert not files(tmp_path, "spare*")
    assert not files(tmp_path, "*.arrow")


class TestReadersOfADeletedObject:
    """They opened it before it was deleted and overwritten."""

    def check_is_a_miss(self, store: FsBlockStore, reader_store: FsBlockStore) -> None:
        """Recycle the object of `old` just when `reader_store` has opened it; then read on."""
        old, new = chain_of(6), chain_of(6, first_token=700)
        opened = LocalMedium.open

        def open_then_recycle(medium: LocalMedium, name: str) -> object:
            reader = opened(medium, name)
            LocalMedium.open = opened  # type: ignore[method-assign]
            delete_all(store)
            assert store.write(run_of(new)) == 6
            return reader

        LocalMedium.open = open_then_recycle  # type: ignore[assignment,method-assign]
        try:
            assert read_all(reader_store, old.hashes) == []
        finally:
            LocalMedium.open = opened  # type: ignore[method-assign]
        assert read_all(store, new.hashes) == payloads_of(new.hashes)
        assert reader_store.faults.corrupt == 0
        assert store.match(new.hashes) == 6

    def test_with_the_head_known(self, store: FsBlockStore, tmp_path: Path) -> None:
        store.write(run_of(chain_of(6)))
        reader = open_recycling(tmp_path)
        assert reader.match(chain_of(6).hashes) == 6
        self.check_is_a_miss(store, reader)
        assert reader.faults == StoreFaults(corrupt=0, foreign=0, vanished=1)

    def test_with_the_head_to_be_read(self, store: FsBlockStore, tmp_path: Path) -> None:
        store.write(run_of(chain_of(6)))
        self.check_is_a_miss(store, open_recycling(tmp_path))

    def test_with_the_object_written_again_meanwhile(
        self, store: FsBlockStore, tmp_path: Path
    ) -> None:
        """Then there is a good copy under the name, and it is read."""
        chain, other = chain_of(6), chain_of(6, first_token=700)
        store.write(run_of(chain))
        reader = open_recycling(tmp_path)
        assert reader.match(chain.hashes) == 6
        opened = LocalMedium.open
        with pytest.MonkeyPatch.context() as patch:

            def open_then_recycle(medium: LocalMedium, name: str) -> object:
                descriptor = opened(medium, name)
                patch.undo()
                delete_all(store)
                store.write(run_of(other))
                store.write(run_of(chain))
                return descriptor

            patch.setattr(LocalMedium, "open", open_then_recycle)
            assert read_all(reader, chain.hashes) == payloads_of(chain.hashes)
        assert reader.faults.corrupt == 0


def test_readers_while_everything_is_recycled_all_the_time(
    store: FsBlockStore, tmp_path: Path
) -> None:
    """Threads that read, against one that deletes and writes: right bytes or a miss."""
    chains = [chain_of(40, first_token=10_000 * number) for number in range(6)]
    is_over = threading.Event()
    errors: list[BaseException] = []

    def read_on(reader: FsBlockStore) -> None:
        try:
            while not is_over.is_set():
                for chain in chains:
                    found = read_all(reader, chain.hashes)
                    assert found == payloads_of(chain.hashes[: len(found)])
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read_on, args=(open_recycling(tmp_path),)) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for number in range(60):
            store.write(run_of(chains[number % 6]))
            store.write(run_of(chains[(number + 1) % 6]))
            delete_all(store)
            if errors:
                break
    finally:
        is_over.set()
        for thread in readers:
            thread.join()
    assert not errors
    assert len(files(tmp_path, "spare/*")) <= 3
    for chain in chains:
        store.write(run_of(chain))
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


def test_several_takers_never_share_a_spare(tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    folder.mkdir()
    pool = [SpareFiles(str(folder / "spare"), MANY_BYTES) for _ in range(4)]
    for number in range(20):
        (folder / f"{number}").write_bytes(b"x" * 5000)
        assert pool[0].keep(str(folder / f"{number}"))
    barrier, taken = threading.Barrier(4), []

    def take(index: int) -> None:
        barrier.wait()
        for number in range(20):
            descriptor = pool[index].claim(str(folder / f"{index}-{number}"), 5000)
            if descriptor is not None:
                taken.append(os.fstat(descriptor).st_ino)
                os.close(descriptor)

    threads = [threading.Thread(target=take, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 20


class TestWhatIsNotOurs:
    def test_a_file_with_a_second_name_is_left_to_it(
        self, store: FsBlockStore, tmp_path: Path
    ) -> None:
        """A backup made of hard links must not change."""
        store.write(run_of(chain_of(3)))
        (path,) = tmp_path.rglob("*.arrow")
        os.link(path, tmp_path / "backup")
        content = path.read_bytes()
        delete_all(store)
        assert not files(tmp_path, "spare/*")
        store.write(run_of(chain_of(3, first_token=70)))
        assert (tmp_path / "backup").read_bytes() == content

    def test_a_spare_that_got_a_second_name_is_not_written_to(
        self, store: FsBlockStore, tmp_path: Path
    ) -> None:
        store.write(run_of(chain_of(3)))
        delete_all(store)
        (spare,) = tmp_path.rglob("spare/*")
        os.link(spare, tmp_path / "backup")
        content = spare.read_bytes()
        assert store.write(run_of(chain_of(3, first_token=70))) == 3
        assert (tmp_path / "backup").read_bytes() == content
        assert not list(tmp_path.rglob("*.tmp"))

    def test_another_users_file_is_not_kept(
        self, store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(run_of(chain_of(3)))
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        delete_all(store)
        assert not files(tmp_path, "spare/*")
        assert not files(tmp_path, "*.arrow")

    def test_a_symbolic_link_among_the_spares_is_not_followed(
        self, store: FsBlockStore, tmp_path: Path
    ) -> None:
        store.write(run_of(chain_of(3)))
        delete_all(store)
        (spare,) = tmp_path.rglob("spare/*")
        victim = tmp_path / "victim"
        victim.write_bytes(b"precious")
        spare.unlink()
        spare.symlink_to(victim)
        assert store.write(run_of(chain_of(3, first_token=70))) == 3
        assert victim.read_bytes() == b"precious"

    def test_a_mounted_disk_keeps_no_spares(
        self, store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(spares, "file_system_of", lambda path: "nfs4")
        store.write(run_of(chain_of(3)))
        delete_all(store)
        assert not files(tmp_path, "spare*")
        assert not files(tmp_path, "*.arrow")


def test_spares_keep_to_their_bound(tmp_path: Path) -> None:
    object_bytes = 4096 + 3 * BLOCK_BYTES
    store = open_recycling(tmp_path, spare_bytes=5 * object_bytes)
    for number in range(8):
        store.write(run_of(chain_of(3, first_token=1000 * number)))
    delete_all(store)
    kept = files(tmp_path, "spare/*")
    assert 2 <= len(kept) <= 5
    assert sum(path.stat().st_size for path in kept.values()) <= 5 * object_bytes


def test_a_damaged_object_is_not_reused(store: FsBlockStore, tmp_path: Path) -> None:
    """What damaged it may be the disk below it."""
    store.write(run_of(chain_of(3)))
    (path,) = tmp_path.rglob("*.arrow")
    data = bytearray(path.read_bytes())
    data[4096 + 5] ^= 1
    path.write_bytes(data)
    assert read_all(store, chain_of(3).hashes) == []
    assert store.faults.corrupt == 1
    assert not files(tmp_path, "spare/*")
    assert not path.exists()


def test_spares_that_nobody_takes_are_given_back(store: FsBlockStore, tmp_path: Path) -> None:
    for number in range(2):
        store.write(run_of(chain_of(3, first_token=1000 * number)))
    delete_all(store)
    first, second = sorted(tmp_path.rglob("spare/*"))
    long_ago_s = time.time() - STALE_SPARE_S - 60
    os.utime(first, (long_ago_s, long_ago_s))
    assert list(store.entries()) == []
    assert first.exists()  # looking changes nothing
    WholeStore(store.url).find(tidies=True)
    assert not first.exists()
    assert second.exists()


def test_a_full_disk_gets_all_of_them_back(
    store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        store.write(run_of(chain_of(3, first_token=1000 * number)))
    delete_all(store)

    def fail(descriptor: int, buffers: list[memoryview], position: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(StoreFullError):
            store.write(run_of(chain_of(3, first_token=7000)))
    assert not files(tmp_path, "spare/*")


def test_an_old_object_is_a_young_spare_and_a_young_temporary(
    store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another process's listing would take it away as stale, even while it is written."""
    store.write(run_of(chain_of(3)))
    (path,) = tmp_path.rglob("*.arrow")
    os.utime(path, (1000.0, 1000.0))
    delete_all(store)
    (spare,) = tmp_path.rglob("spare/*")
    assert time.time() - spare.stat().st_mtime < 60
    os.utime(spare, (1000.0, 1000.0))
    write, ages_s = local_medium._write, []

    def look_then_write(descriptor: int, parts: list[memoryview]) -> None:
        (temporary,) = tmp_path.rglob("*.tmp")
        ages_s.append(time.time() - temporary.stat().st_mtime)
        write(descriptor, parts)

    monkeypatch.setattr(local_medium, "_write", look_then_write)
    store.write(run_of(chain_of(3, first_token=70)))
    assert len(ages_s) == 1
    assert ages_s[0] < 60


def test_a_failed_write_leaves_no_file_behind(
    store: FsBlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(run_of(chain_of(3)))
    delete_all(store)

    def fail(descriptor: int, buffers: list[memoryview], position: int) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(ValueError, match="a bug"):
        store.write(run_of(chain_of(3, first_token=70)))
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.arrow"))


@given(st.lists(st.integers(1, 1000), max_size=8), st.integers(1, 1000))
def test_the_best_fit(sizes: list[int], num_bytes: int) -> None:
    chosen = best_fit(sizes, num_bytes)
    if chosen is None:
        assert all(size > 2 * num_bytes for size in sizes)
        return
    assert chosen in sizes
    fitting = [size for size in sizes if num_bytes <= size <= 2 * num_bytes]
    assert chosen == (min(fitting) if fitting else max(s for s in sizes if s < num_bytes))


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [(None, 0), (1 << 30, (1 << 30) // 20), (1 << 40, 256 << 20)],
)
def test_how_many_spare_bytes_suit_a_budget(max_bytes: int | None, expected: int) -> None:
    assert spare_bytes_of(max_bytes) == expected


def test_the_file_system_of_a_path() -> None:
    assert file_system_of("/proc") == "proc"
