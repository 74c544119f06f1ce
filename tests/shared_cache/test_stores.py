"""Every store keeps the contract; those on fsspec also survive what media do to them."""

import errno
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from shared_cache.hashing import BlockHashChain
from shared_cache.stores import fs_store
from shared_cache.stores.fs_store import StoreFaults, open_store
from shared_cache.stores.store import BlockStore, MemoryBlockStore
from shared_cache.upkeep.whole_store import WholeStore
from tests.shared_cache import fake_file_systems
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, run_of
from tests.shared_cache.store_contract import BlockStoreContract, payloads_of, read_all


@pytest.fixture(autouse=True)
def fake_protocols() -> Iterator[None]:
    with fake_file_systems.registered():
        yield


@pytest.fixture(params=["file", "memory", "mounted", "faulty"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's URL, once for each way of publishing (and once for a fake object store)."""
    is_folder = request.param in ("file", "mounted")
    return f"{request.param}://{tmp_path / 'store' if is_folder else '/' + uuid.uuid4().hex}"


class TestMemoryBlockStore(BlockStoreContract):
    @pytest.fixture
    def store(self) -> BlockStore:
        return MemoryBlockStore(NAMESPACE)


class TestFsBlockStore(BlockStoreContract):
    @pytest.fixture
    def store(self, url: str) -> BlockStore:
        return open_store(url, NAMESPACE)


class TestCompressedStore(BlockStoreContract):
    @pytest.fixture
    def store(self, url: str) -> BlockStore:
        return open_store(url, NAMESPACE, codec="shuffle-zstd")


class TestRecyclingStore(BlockStoreContract):
    """Every file that is written was another one before."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> BlockStore:
        store = open_store(f"file://{tmp_path}", NAMESPACE, spare_bytes=1 << 20)
        for number in range(8):
            store.write(run_of(chain_of(5, first_token=1000 * (number + 1))))
        for entry in list(store.entries()):
            store.delete(entry.name)
        assert len(list(tmp_path.rglob("spare/*"))) == 8
        return store


def object_paths(url: str) -> list[str]:
    fs, root = fsspec.url_to_fs(url)
    return sorted(p for p in fs.find(root) if not p.endswith("namespace.json"))


def change(url: str, path: str, edit: Callable[[bytes], bytes]) -> None:
    fs, _ = fsspec.url_to_fs(url)
    data = edit(fs.cat_file(path))
    fs.rm_file(path)
    with fs.open(path, "wb") as file:
        file.write(data)


def flip_payload(row: int) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        position = 4096 + row * BLOCK_BYTES + 5
        return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]

    return edit


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    "first payload": (flip_payload(0), 0),
    "third payload": (flip_payload(2), 2),
    "cut in the second payload": (lambda data: data[: 4096 + BLOCK_BYTES + 7], 1),
    "cut off in the head": (lambda data: data[:600], 0),
    "emptied": (lambda data: b"", 0),
    "head overwritten": (lambda data: b"\0" * 4096 + data[4096:], 0),
    "hash changed in the head": (lambda data: data.replace(chain_of(2).hashes[1], b"x" * 32), 0),
}


@pytest.mark.parametrize(
    ("what", "knows_head"),
    [(what, False) for what in DAMAGE] + [(what, True) for what in DAMAGE if "head" not in what],
)
def test_damage_is_a_miss_and_makes_room_for_a_good_copy(
    url: str, what: str, knows_head: bool
) -> None:
    edit, num_good = DAMAGE[what]
    chain = chain_of(4)
    writer = open_store(url, NAMESPACE)
    writer.write(run_of(chain))
    (path,) = object_paths(url)
    change(url, path, edit)
    store = writer if knows_head else open_store(url, NAMESPACE)
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes[:num_good])
    assert store.faults == StoreFaults(corrupt=1, foreign=0, vanished=0)
    assert store.match(chain.hashes) == 0
    assert store.write(run_of(chain)) == 4
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
    assert store.faults.corrupt == 1


def test_a_vanished_object_is_a_miss(url: str) -> None:
    chain = chain_of(4)
    store = open_store(url, NAMESPACE)
    store.write(run_of(chain_of(2)))
    store.write(run_of(chain))
    fs, _ = fsspec.url_to_fs(url)
    (second,) = (p for p in object_paths(url) if chain.hashes[2].hex() in p)
    fs.rm_file(second)
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes[:2])
    assert store.faults == StoreFaults(corrupt=0, foreign=0, vanished=1)
    assert store.match(chain.hashes) == 2
    assert store.write(run_of(chain)) == 2
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


def test_an_object_replaced_under_a_reader_is_read_anew_and_kept(url: str) -> None:
    """On object stores the last of two simultaneous writers of one beginning wins."""
    known = chain_of(4)
    other = BlockHashChain(known.tokens_per_block, tokens=[*range(8), *range(90, 98)])
    store = open_store(url, NAMESPACE)
    store.write(run_of(known))
    elsewhere = open_store("memory:///" + uuid.uuid4().hex, NAMESPACE)
    elsewhere.write(run_of(other))
    (path,), (source,) = object_paths(url), object_paths(elsewhere.url)
    replacement = fsspec.filesystem("memory").cat_file(source)
    change(url, path, lambda data: replacement)
    assert read_all(store, known.hashes) == payloads_of(known.hashes[:2])
    assert read_all(store, other.hashes) == payloads_of(other.hashes)
    assert store.faults.corrupt == 0
    assert object_paths(url) == [path]
    assert store.write(run_of(known)) == 2
    assert read_all(store, known.hashes) == payloads_of(known.hashes)


def test_another_namespace_in_the_same_place_is_foreign(url: str) -> None:
    chain = chain_of(3)
    stranger = replace(NAMESPACE, model="stranger")
    theirs = open_store(url, stranger)
    theirs.write(run_of(chain))
    ours = open_store(url, NAMESPACE)
    assert ours.match(chain.hashes) == 0
    (path,) = object_paths(url)
    fs, _ = fsspec.url_to_fs(url)
    moved = path.replace(stranger.fingerprint, NAMESPACE.fingerprint)
    fs.makedirs(moved.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(moved, fs.cat_file(path))
    assert ours.match(chain.hashes) == 0
    assert read_all(ours, chain.hashes) == []
    assert list(ours.entries()) == []
    assert ours.faults == StoreFaults(corrupt=0, foreign=3, vanished=0)
    assert ours.write(run_of(chain)) == 3
    assert read_all(ours, chain.hashes) == payloads_of(chain.hashes)
    assert theirs.match(chain.hashes) == 3


def test_a_good_object_under_a_wrong_name_is_no_hit(url: str) -> None:
    store, chain, other = open_store(url, NAMESPACE), chain_of(2), chain_of(2, first_token=70)
    store.write(run_of(chain))
    (path,) = object_paths(url)
    fs, _ = fsspec.url_to_fs(url)
    wrong = str(
        Path(path).parents[1] / other.hashes[0].hex()[:2] / f"{other.hashes[0].hex()}.arrow"
    )
    fs.makedirs(wrong.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(wrong, fs.cat_file(path))
    assert open_store(url, NAMESPACE).match(other.hashes) == 0
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


def test_other_processes_writes_are_seen_at_once(url: str) -> None:
    reader, writer = open_store(url, NAMESPACE), open_store(url, NAMESPACE)
    chain = chain_of(6)
    for length in (2, 3, 6):
        writer.write(run_of(chain_of(length)))
        assert reader.match(chain.hashes) == length
    assert read_all(reader, chain.hashes) == payloads_of(chain.hashes)
    assert len(object_paths(url)) == 3


def test_listing_rebuilds_the_knowledge_of_inner_blocks(url: str) -> None:
    chain = chain_of(6)
    open_store(url, NAMESPACE).write(run_of(chain))
    fresh = open_store(url, NAMESPACE)
    assert fresh.match(chain.hashes[3:]) == 0
    assert [entry.hashes for entry in fresh.entries()] == [tuple(chain.hashes)]
    assert fresh.match(chain.hashes[3:]) == 3
    assert read_all(fresh, chain.hashes[3:]) == payloads_of(chain.hashes[3:])


def test_a_long_run_becomes_objects_of_a_limited_size(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs_store, "MAX_OBJECT_BYTES", 4 * BLOCK_BYTES + 1)
    store, chain = open_store(url, NAMESPACE), chain_of(15)
    store.write(run_of(chain_of(6)).tail(5))  # a block in the middle is there already
    assert store.write(run_of(chain)) == 15
    assert store.write(run_of(chain)) == 0
    fresh = open_store(url, NAMESPACE)
    assert sorted(len(entry.hashes) for entry in fresh.entries()) == [1, 3, 4, 4, 4]
    assert read_all(open_store(url, NAMESPACE), chain.hashes) == payloads_of(chain.hashes)


def test_names_in_the_store(url: str) -> None:
    store, chain = open_store(url, NAMESPACE), chain_of(2)
    store.write(run_of(chain))
    first = chain.hashes[0].hex()
    folder = f"{fsspec.url_to_fs(url)[1]}/v2/{NAMESPACE.fingerprint}"
    assert object_paths(url) == [f"{folder}/{first[:2]}/{first}.arrow"]
    assert [entry.name for entry in store.entries()] == [f"{first[:2]}/{first}.arrow"]
    fs, _ = fsspec.url_to_fs(url)
    assert json.loads(fs.cat_file(f"{folder}/namespace.json")) == json.loads(NAMESPACE.to_json())


@pytest.mark.parametrize(
    "name", ["../namespace.json", "ab/abc.arrow", "", f"ab/cd{'0' * 62}.arrow"]
)
def test_only_objects_can_be_deleted(url: str, name: str) -> None:
    with pytest.raises(ValueError, match="take names from entries"):
        open_store(url, NAMESPACE).delete(name)


@pytest.mark.parametrize("protocol", ["file", "mounted"])
def test_temporaries_are_not_listed_and_old_ones_removed(protocol: str, tmp_path: Path) -> None:
    url = f"{protocol}://{tmp_path}"
    store = open_store(url, NAMESPACE)
    store.write(run_of(chain_of(1)))
    (path,) = object_paths(url)
    young, old = (Path(f"{path}.{digit * 16}.tmp") for digit in "12")
    for temporary in (young, old):
        temporary.write_bytes(b"half")
    hours_ago_s, days_ago_s = time.time() - 7200, time.time() - 2 * 86400
    os.utime(young, (hours_ago_s, hours_ago_s))  # or the clock has been set
    os.utime(old, (days_ago_s, days_ago_s))
    assert len(list(store.entries())) == 1
    assert store.refresh() == 1
    assert WholeStore(url).find()[0].num_objects == 1
    assert old.exists()  # looking changes nothing
    assert WholeStore(url).find(tidies=True)[0].num_objects == 1
    assert young.exists()
    assert not old.exists()


def test_the_first_of_several_local_writers_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice somebody else publishes what this writer has just looked up as missing."""
    slow, quick = (open_store(f"file://{tmp_path}", NAMESPACE) for _ in range(2))
    longest, link = chain_of(7), os.link
    lengths = iter([3, 7])

    def late_link(source: str, target: str) -> None:
        if length := next(lengths, None):
            with monkeypatch.context() as patch:
                patch.setattr(os, "link", link)
                quick.write(run_of(chain_of(length)))
        link(source, target)

    monkeypatch.setattr(os, "link", late_link)
    assert slow.write(run_of(chain_of(5))) == 0
    fresh = open_store(slow.url, NAMESPACE)
    assert sorted(len(entry.hashes) for entry in fresh.entries()) == [3, 4]
    assert read_all(fresh, longest.hashes) == payloads_of(longest.hashes)


def test_a_disk_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_link)
    store = open_store(f"file://{tmp_path}", NAMESPACE)
    assert store.write(run_of(chain_of(3))) == 3
    assert read_all(store, chain_of(3).hashes) == payloads_of(chain_of(3).hashes)
    assert len(object_paths(store.url)) == 1


def test_long_reads_are_for_local_disks_alone(tmp_path: Path) -> None:
    """From a distance many short ones are quicker, and more of them come in time."""
    assert open_store(f"file://{tmp_path}", NAMESPACE).read_bytes >= 16 << 20
    assert open_store("memory://no-long-reads", NAMESPACE).read_bytes == 0
