"""Media move bytes exactly, however few a call moves and however large the pieces are."""

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.errors import StoreError
from shared_cache.media import medium
from shared_cache.media.fsspec_media import ObjectMedium, RenamingMedium
from shared_cache.media.local_medium import LocalMedium
from shared_cache.media.medium import Medium, advance, batches
from shared_cache.stores.fs_store import StoreFaults, open_store
from tests.shared_cache import fake_file_systems
from tests.shared_cache.fake_file_systems import FaultyObjects, MountedFileSystem
from tests.shared_cache.fakes import NAMESPACE, chain_of, run_of
from tests.shared_cache.store_contract import payloads_of, read_all


@pytest.fixture(autouse=True)
def fake_protocols() -> Iterator[None]:
    with fake_file_systems.registered():
        yield


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 40), st.integers(1, 5))
def test_batches_keep_order_and_limits(sizes: list[int], limit: int, max_vectors: int) -> None:
    data = bytes(range(256)) * 4
    views, start = [], 0
    for size in sizes:
        views.append(memoryview(data)[start : start + size])
        start += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medium, "BATCH_BYTES", limit)
        patch.setattr(medium, "_MAX_VECTORS", max_vectors)
        groups = list(batches(views))
    assert b"".join(piece for group in groups for piece in group) == data[:start]
    for group in groups:
        assert sum(piece.nbytes for piece in group) <= limit
        assert len(group) <= max_vectors


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 60))
def test_advance_drops_exactly_that_many_bytes(sizes: list[int], num_bytes: int) -> None:
    data = bytes(range(60))
    views = [memoryview(data)[:size] for size in sizes]
    whole = b"".join(views)
    assert b"".join(advance(views, num_bytes)) == whole[num_bytes:]


MEDIA: dict[str, Callable[[str], Medium]] = {
    "local": LocalMedium,
    "objects": lambda folder: ObjectMedium(FaultyObjects(), folder),
    "mounted": lambda folder: RenamingMedium(MountedFileSystem(), folder),
}


@pytest.fixture(params=MEDIA)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Medium:
    return MEDIA[request.param](str(tmp_path))


@pytest.mark.parametrize("kind", MEDIA)
@given(
    parts=st.lists(st.binary(max_size=50), max_size=5),
    start=st.integers(0, 120),
    sizes=st.lists(st.integers(0, 40), max_size=5),
)
def test_what_was_published_can_be_read_from_anywhere(
    kind: str, parts: list[bytes], start: int, sizes: list[int]
) -> None:
    data = b"".join(parts)
    buffers = [bytearray(size) for size in sizes]
    with tempfile.TemporaryDirectory() as path:
        folder = MEDIA[kind](path)
        assert folder.publish("a", [memoryview(part) for part in parts], replace=True)
        with folder.open("a") as reader:
            num_filled = reader.fill(start, [memoryview(buffer) for buffer in buffers])
    assert num_filled == len(data[start : start + sum(sizes)])
    assert b"".join(buffers)[:num_filled] == data[start : start + num_filled]


def test_reading_across_the_end(folder: Medium) -> None:
    folder.prepare()
    assert folder.publish("a/b", [memoryview(b"0123"), memoryview(b"456789")])
    buffers = [bytearray(3) for _ in range(3)]
    with folder.open("a/b") as reader:
        assert reader.read(8, 100) == b"89"
        assert reader.read(50, 1) == b""
        assert reader.fill(5, [memoryview(buffer) for buffer in buffers]) == 5
    assert b"".join(buffers).rstrip(b"\0") == b"56789"
    with pytest.raises(FileNotFoundError), folder.open("a/c") as reader:
        reader.read(0, 1)


def test_publishing_listing_removing(folder: Medium) -> None:
    folder.prepare()
    assert list(folder.list()) == []
    for name, content in (("x/1", b"a"), ("y/2", b"bcd")):
        assert folder.publish(name, [memoryview(content)])
    assert sorted(item[:2] for item in folder.list()) == [("x/1", 1), ("y/2", 3)]
    assert all(abs(item.used_s - time.time()) < 60 for item in folder.list())
    assert folder.publish("x/1", [memoryview(b"zz")], replace=True)
    for _ in range(2):
        folder.remove("y/2")
    assert [item[:2] for item in folder.list()] == [("x/1", 2)]


def test_system_calls_that_move_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: pwritev(fd, [views[0][:5]], at))
    store, chain = open_store(f"file://{tmp_path}", NAMESPACE), chain_of(3)
    store.write(run_of(chain))
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


def test_an_upload_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several would make a name's content change under its readers."""
    store, operations = open_store("faulty:///a", NAMESPACE), []
    monkeypatch.setattr(FaultyObjects, "before", staticmethod(operations.append))
    store.write(run_of(chain_of(3)))
    assert operations.count("write") == 1


def test_an_object_store_that_refuses_ranges_beyond_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As S3 does: what is cut short there is damage, not a store that is away."""
    store, chain = open_store("faulty:///a", NAMESPACE), chain_of(3)
    store.write(run_of(chain))
    path = next(path for path in FaultyObjects.store if path.endswith(".arrow"))
    fs = FaultyObjects()
    fs.pipe_file(path, fs.cat_file(path)[:4096])
    cat_file = FaultyObjects.cat_file

    def cat_like_s3(
        self: FaultyObjects, path: str, start: int = 0, end: int | None = None
    ) -> bytes:
        data: bytes = cat_file(self, path, start, end)
        if not data:
            raise OSError(errno.EINVAL, "InvalidRange")
        return data

    monkeypatch.setattr(FaultyObjects, "cat_file", cat_like_s3)
    assert read_all(store, chain.hashes) == []
    assert store.faults == StoreFaults(corrupt=1, foreign=0, vanished=0)


def test_one_cut_answer_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(3)
    open_store("faulty:///a", NAMESPACE).write(run_of(chain))
    store, cat_file = open_store("faulty:///a", NAMESPACE), FaultyObjects.cat_file

    def cut_once(self: FaultyObjects, path: str, start: int = 0, end: int = 0) -> bytes:
        monkeypatch.setattr(FaultyObjects, "cat_file", cat_file)
        data: bytes = cat_file(self, path, start, end)
        return data[:10]

    monkeypatch.setattr(FaultyObjects, "cat_file", cut_once)
    assert store.match(chain.hashes) == 3
    monkeypatch.setattr(FaultyObjects, "cat_file", cut_once)
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
    assert store.faults == StoreFaults(corrupt=0, foreign=0, vanished=0)


def test_a_short_answer_ends_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on would put the rest in the wrong places."""
    objects, buffer = ObjectMedium(FaultyObjects(), "/folder"), bytearray(20)
    objects.publish("a", [memoryview(bytes(range(20)))])
    answers = iter([b"\0\1\2", b"xxxxxxxxxx"])
    monkeypatch.setattr(FaultyObjects, "cat_file", lambda *_, **__: next(answers))
    monkeypatch.setattr(medium, "BATCH_BYTES", 10)
    with objects.open("a") as reader:
        assert reader.fill(0, [memoryview(buffer)]) == 3
    assert buffer == b"\0\1\2" + bytes(17)


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty answer would look like an empty store."""
    store, scandir = open_store(f"file://{tmp_path}", NAMESPACE), os.scandir
    store.write(run_of(chain_of(2)))

    def refuse_inner(path: str) -> object:
        if Path(path).name == chain_of(1).hashes[0].hex()[:2]:
            raise PermissionError(errno.EACCES, "no", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_inner)
    with pytest.raises(StoreError, match="permission to read and list"):
        list(store.entries())
