"""Upkeep of real stores: within the limits, beside readers and writers, by one process at once."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from shared_cache.config import TierConfig
from shared_cache.errors import StoreError
from shared_cache.hashing import DEFAULT_SCOPE, SCOPE_SEPARATOR, BlockHashChain, ReuseScope
from shared_cache.host.interface import HostLease, NewRun
from shared_cache.host.local import LocalHostTier
from shared_cache.host.turns import RECENT_S
from shared_cache.namespace import FORMAT_VERSION
from shared_cache.stores.fs_store import FsBlockStore, StoreFaults, open_store
from shared_cache.stores.size_estimate import RELIST_ROUNDS
from shared_cache.stores.store import BlockRun, MemoryBlockStore
from shared_cache.upkeep.collecting import CollectionRules
from shared_cache.upkeep.upkeep import Housekeeper, keep_house, plan_collection
from shared_cache.upkeep.upkeep_turn import Turn
from shared_cache.upkeep.verifying import CheckedObject
from shared_cache.upkeep.whole_store import WholeStore, folder_of
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    NAMESPACE,
    WAIT_S,
    FakeClock,
    chain_of,
    payload_of,
    run_of,
)
from tests.shared_cache.store_contract import payloads_of, read_all

OTHER = replace(NAMESPACE, revision="older")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def write_at(
    store: FsBlockStore, chain: BlockHashChain, used_s: float, tenant: bytes = b""
) -> None:
    """Store a chain as if it had been used last at `used_s`."""
    store.write(replace(run_of(chain), tenant=tenant))
    for run in store.entries():
        if set(run.hashes) <= set(chain.hashes):
            os.utime(object_path(store, run.name), (used_s, used_s))


def object_path(store: FsBlockStore, name: str) -> str:
    folder = WholeStore(store.url).local_folder(store.namespace)
    assert folder is not None
    return f"{folder}/{name}"


def put(host: LocalHostTier, chain: BlockHashChain) -> HostLease:
    """The blocks of a chain enter host memory, known to be stored."""
    slots = host.reserve(len(chain.hashes))
    for slot, block_hash in zip(slots, chain.hashes, strict=True):
        host.buffer(slot)[:] = payload_of(block_hash)
    return host.commit(slots, NewRun(chain.parent_of(0), tuple(chain.hashes), is_stored=True))


def chains(count: int, num_blocks: int = 4) -> list[BlockHashChain]:
    return [chain_of(num_blocks, first_token=1000 * i) for i in range(count)]


def write_unreadable(root: Path, version: int, num_bytes: int, used_s: float) -> Path:
    """An object of another version of the format."""
    path = root / f"v{version}" / "abc" / "cd" / f"{'cd' * 32}.arrow"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"?" * num_bytes)
    os.utime(path, (used_s, used_s))
    return path


def stored_bytes(url: str) -> int:
    return sum(found.num_bytes for found in WholeStore(url).find())


class CountingStore(MemoryBlockStore):
    """Counts its listings."""

    def __init__(self) -> None:
        super().__init__(NAMESPACE)
        self.num_listings = 0

    def entries(self) -> Iterator:
        self.num_listings += 1
        return super().entries()


def tick(keeper: Housekeeper, num_rounds: int = 1) -> None:
    for _ in range(num_rounds):
        keeper.tick()


class TestHousekeeper:
    def test_it_keeps_the_budget_for_all_namespaces_together(self, url: str) -> None:
        """Most of what fills a disk belongs to models that nobody runs any more."""
        now_s = time.time()
        old, new = open_store(url, OTHER), open_store(url, NAMESPACE)
        for age, chain in enumerate(chains(4)):
            write_at(old, chain, now_s - 5000 - age)
            write_at(new, chain, now_s - age)
        tier = TierConfig(url=url, max_bytes=stored_bytes(url) * 6 // 10)
        keeper = keep_house(new, tier)
        assert keeper is not None
        collected = keeper.tick()
        keeper.close()
        assert collected is not None
        assert collected.left_bytes == stored_bytes(url) <= tier.max_bytes
        assert {victim.namespace for victim in collected.victims} == {folder_of(OTHER)}
        for chain in chains(4):
            assert read_all(new, chain.hashes) == payloads_of(chain.hashes)

    def test_it_deletes_by_age(self, url: str) -> None:
        store, now_s = open_store(url, NAMESPACE), time.time()
        fresh, stale = chains(2)
        write_at(store, fresh, now_s - 100)
        write_at(store, stale, now_s - 7200)
        keeper = keep_house(store, TierConfig(url=url, max_age_s=3600))
        assert keeper is not None
        keeper.tick()
        keeper.close()
        assert store.match(stale.hashes) == 0
        assert store.match(fresh.hashes) == 4

    def test_a_tenant_beyond_its_quota_loses_its_oldest_blocks_and_nobody_else_any(
        self, url: str
    ) -> None:
        store, now_s = open_store(url, NAMESPACE), time.time()
        red, blue = ReuseScope("red"), ReuseScope("blue")
        narrow = ReuseScope(f"red{SCOPE_SEPARATOR}client")
        sizes = {}
        for age, (scope, first) in enumerate(
            [(red, 0), (narrow, 0), (blue, 0), (red, 1000), (blue, 1000), (DEFAULT_SCOPE, 0)]
        ):
            chain = chain_of(4, first, scope)
            write_at(store, chain, now_s - 100 * age, scope.tenant)
            sizes[scope, first] = stored_bytes(url)
        one_bytes = sizes[red, 0]
        tier = TierConfig(url=url, quotas={"red": int(2.5 * one_bytes), "nobody": 1})
        keeper = keep_house(store, tier)
        assert keeper is not None
        collected = keeper.tick()
        assert {one.reason for one in collected.victims} == {"quota"}
        found = {
            key: open_store(url, NAMESPACE).match(chain_of(4, key[1], key[0]).hashes)
            for key in sizes
        }
        assert found == {**dict.fromkeys(sizes, 4), (red, 1000): 0}
        keeper.tick()  # until it has listed twice it lists in every round
        write_at(store, chain_of(4, 5000, narrow), now_s, red.tenant)
        assert keeper.tick() is None
        keeper.written(one_bytes)
        assert len(keeper.tick().victims) == 1
        assert keeper.tick() is None
        keeper.close()

    def test_it_deletes_what_older_versions_left(self, url: str, tmp_path: Path) -> None:
        store, now_s = open_store(url, NAMESPACE), time.time()
        write_at(store, chain_of(4), now_s - 100)
        older = write_unreadable(tmp_path / "store", FORMAT_VERSION - 1, 10, now_s - 7200)
        newer = write_unreadable(tmp_path / "store", FORMAT_VERSION + 1, 10, now_s - 7200)
        keeper = keep_house(store, TierConfig(url=url, max_age_s=3600))
        assert keeper is not None
        keeper.tick()
        keeper.close()
        assert (older.exists(), newer.exists()) == (False, True)
        assert store.match(chain_of(4).hashes) == 4

    def test_a_tier_without_limits_or_that_is_only_read_has_none(self, url: str) -> None:
        store = open_store(url, NAMESPACE)
        assert keep_house(store, TierConfig(url=url)) is None
        store.read_only = True
        assert keep_house(store, TierConfig(url=url, max_bytes=1)) is None

    def test_a_store_in_which_little_changed_is_not_listed(self) -> None:
        store = CountingStore()
        store.write(run_of(chain_of(4)))
        keeper = Housekeeper(store, CollectionRules(8 * BLOCK_BYTES))
        tick(keeper, 2)
        assert store.num_listings == 2  # it is not known yet how fast it grows
        tick(keeper, RELIST_ROUNDS - 1)
        assert store.num_listings == 2
        keeper.written(4 * BLOCK_BYTES)
        keeper.tick()
        assert store.num_listings == 3  # the tenth round
        keeper.written(3 * BLOCK_BYTES)
        keeper.tick()
        assert store.num_listings == 3  # it cannot be over its budget yet
        store.write(run_of(chain_of(5, first_token=1000)))
        keeper.written(2 * BLOCK_BYTES)
        keeper.tick()
        assert store.num_listings == 4
        assert sum(run.num_bytes for run in store.entries()) <= 8 * BLOCK_BYTES * 0.9

    def test_what_others_write_is_expected_from_what_they_wrote(self) -> None:
        store = CountingStore()
        keeper = Housekeeper(store, CollectionRules(100 * BLOCK_BYTES))
        tick(keeper, 2)
        store.write(run_of(chain_of(60)))
        tick(keeper, RELIST_ROUNDS)  # the last of them finds 60 blocks in 10 rounds
        assert store.num_listings == 3
        tick(keeper, 6)
        assert store.num_listings == 3
        tick(keeper, 1)  # 60 + 7 * 6 blocks are more than 100
        assert store.num_listings == 4

    def test_a_disk_that_is_full_is_looked_at_in_the_next_round(self) -> None:
        store = CountingStore()
        keeper = Housekeeper(store, CollectionRules(100 * BLOCK_BYTES))
        tick(keeper, 3)
        assert store.num_listings == 2
        keeper.found_full()
        tick(keeper, 2)
        assert store.num_listings == 3

    def test_over_its_budget_it_does_not_wait_for_its_next_round(self) -> None:
        store, is_clean = CountingStore(), threading.Event()
        keeper = Housekeeper(store, CollectionRules(8 * BLOCK_BYTES), interval_s=3600.0)

        def delete(name: str) -> None:
            MemoryBlockStore.delete(store, name)
            is_clean.set()

        store.delete = delete
        keeper.start()
        for _ in range(3):
            keeper.written(store.write(run_of(chain_of(3, first_token=1000))) * BLOCK_BYTES)
        assert not is_clean.is_set()
        keeper.written(store.write(run_of(chain_of(6))) * BLOCK_BYTES)
        assert is_clean.wait(WAIT_S)
        keeper.close()

    @pytest.mark.parametrize("is_full", [True, False])
    def test_who_may_not_clean_up_tells_who_does(self, url: str, is_full: bool) -> None:
        stores = [open_store(url, NAMESPACE) for _ in range(2)]
        cleaning, writing = (
            Housekeeper(store, CollectionRules(100_000), whole=WholeStore(url)) for store in stores
        )
        tick(cleaning, 2)
        assert writing.tick() is None
        stores[1].write(run_of(chain_of(1)))
        for chain in chains(100):
            num_written = stores[1].write(run_of(chain))
            if not is_full:
                writing.written(num_written * BLOCK_BYTES)
        if is_full:
            writing.found_full()
        assert stored_bytes(url) > 100_000
        assert cleaning.tick() is not None
        assert stored_bytes(url) <= 100_000
        assert cleaning.tick() is None
        cleaning.close()
        writing.close()

    def test_what_this_node_has_in_use_stays(self, url: str) -> None:
        store, now_s = open_store(url, NAMESPACE), time.time()
        leased, recent, unused, newest = chains(4)
        for age, chain in enumerate((newest, unused, recent, leased)):
            write_at(store, chain, now_s - 7200 * age)
        clock = FakeClock()
        host = LocalHostTier(32 * 4096, BLOCK_BYTES, clock=clock)
        lease = put(host, leased)
        host.release(put(host, unused))
        clock.now_s += 2 * RECENT_S
        host.release(put(host, recent))
        assert host.in_use([*leased.hashes, *recent.hashes, *unused.hashes]) == {
            *leased.hashes,
            *recent.hashes,
        }
        keeper = keep_house(store, TierConfig(url=url, max_age_s=3600))
        assert keeper is not None
        keeper.protect(host)
        keeper.tick()
        found = [open_store(url, NAMESPACE).match(c.hashes) for c in (leased, recent, unused)]
        assert found == [4, 4, 0]
        assert host.lease(unused.hashes).to_store == (0, 1, 2, 3)  # deleted, and asked for again
        assert host.lease(leased.hashes).to_store == ()
        host.release(lease)
        keeper.close()

    def test_other_blocks_go_instead_of_those_in_use(self) -> None:
        store, host = MemoryBlockStore(NAMESPACE), LocalHostTier(32 * 4096, BLOCK_BYTES)
        for chain in chains(4, num_blocks=1):
            store.write(run_of(chain))
        runs = sorted(store.entries(), key=lambda run: run.name)
        (first,) = [c for c in chains(4, num_blocks=1) if c.hashes[0] == runs[0].hashes[0]]
        put(host, first)
        plan = plan_collection(
            {"n": store}, CollectionRules(max_bytes=3 * BLOCK_BYTES), 0.0, host, "n"
        )
        names = [victim.run.name for victim in plan.victims]
        assert names == [run.name for run in runs[1:3]]
        for chain in chains(4, num_blocks=1):
            put(host, chain)
        tight = CollectionRules(max_bytes=1)  # only what is in use can go
        assert len(plan_collection({"n": store}, tight, 0.0, host, "n").victims) == 4

    def test_it_works_by_itself_until_it_is_closed(self) -> None:
        store, is_clean = CountingStore(), threading.Event()

        def delete(name: str) -> None:
            MemoryBlockStore.delete(store, name)
            if not list(MemoryBlockStore.entries(store)):
                is_clean.set()

        store.delete = delete
        store.write(run_of(chain_of(4)))
        keeper = Housekeeper(store, CollectionRules(1), interval_s=0.01)
        keeper.start()
        assert is_clean.wait(WAIT_S)
        keeper.close()
        keeper.close()
        num_listings = store.num_listings
        assert not any(t.name == "kvcommons-upkeep" for t in threading.enumerate())
        assert store.num_listings == num_listings

    def test_a_store_in_trouble_is_counted_and_tried_again(self) -> None:
        store, tried_again = CountingStore(), threading.Semaphore(0)

        def entries() -> Iterator:
            tried_again.release()
            raise StoreError("the disk is away")

        store.entries = entries
        keeper = Housekeeper(store, CollectionRules(1), interval_s=0.01)
        keeper.start()
        for _ in range(3):
            assert tried_again.acquire(timeout=WAIT_S)
        keeper.close()
        assert keeper.num_faults >= 2

    def test_a_clock_that_is_set_back_for_a_while_does_no_harm(self, url: str) -> None:
        store, now_s = open_store(url, NAMESPACE), time.time()
        for age, chain in enumerate(chains(4)):
            write_at(store, chain, now_s - age)
        for clock_s in (now_s, now_s - 30 * 86400.0, 5.0):
            whole = WholeStore(url)
            keeper = Housekeeper(
                store, CollectionRules(None, 3600.0), clock=lambda s=clock_s: s, whole=whole
            )
            keeper.tick()
            keeper.close()
            assert [store.match(chain.hashes) for chain in chains(4)] == [4] * 4


class TestTurn:
    def test_one_process_cleans_up_a_local_store(self, tmp_path: Path) -> None:
        first, second = (Turn(str(tmp_path / "upkeep.lock")) for _ in range(2))
        assert first.take()
        assert first.take()
        assert not second.take()
        first.give_up()
        assert second.take()
        second.give_up()

    def test_without_locks_everybody_cleans_up(self, tmp_path: Path, monkeypatch) -> None:
        def no_locks(*_: object, **__: object) -> None:
            raise OSError(38, "not implemented")

        monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
        assert Turn(str(tmp_path / "upkeep.lock")).take()
        assert Turn(None).take()

    def test_a_housekeeper_leaves_the_work_to_the_one_that_does_it(self, url: str) -> None:
        store = open_store(url, NAMESPACE)
        write_at(store, chain_of(4), time.time())
        first, second = (
            Housekeeper(store, CollectionRules(1), whole=WholeStore(url)) for _ in range(2)
        )
        assert first.tick() is not None
        store.write(run_of(chain_of(4)))
        assert second.tick() is None
        assert store.match(chain_of(4).hashes) == 4
        first.close()
        assert second.tick() is not None
        second.close()
        assert store.match(chain_of(4).hashes) == 0


PROMPTS = [chain_of(6, first_token=1000 * i) for i in range(6)]


def read(store: FsBlockStore) -> None:
    for chain in PROMPTS:
        found = read_all(store, chain.hashes)
        assert found == payloads_of(chain.hashes[: len(found)])


def write(store: FsBlockStore) -> None:
    for chain in PROMPTS:
        run = run_of(chain)
        store.write(BlockRun(run.parent, run.hashes[:2], run.payloads[:2]))
        store.write(run)


def clean(store: FsBlockStore) -> None:
    plan = plan_collection({"n": store}, CollectionRules(max_bytes=5000), time.time())
    for victim in plan.victims:
        store.delete(victim.run.name)


def test_clean_up_beside_readers_and_writers_never_shows_a_wrong_byte(url: str) -> None:
    """Readers find the right bytes or a miss; what a writer was told is stored may be gone."""

    def repeat(work: Callable[[FsBlockStore], None]) -> None:
        store = open_store(url, NAMESPACE)
        for _ in range(40):
            work(store)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(repeat, (read, read, write, clean, clean)))
    store = open_store(url, NAMESPACE)
    write(store)
    for chain in PROMPTS:
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
    assert store.faults == StoreFaults(corrupt=0, foreign=0, vanished=0)


class TestWholeStore:
    def test_it_finds_every_namespace_and_makes_nothing(self, url: str, tmp_path: Path) -> None:
        whole = WholeStore(url)
        assert whole.find() == []
        assert not (tmp_path / "store").exists()
        write_at(open_store(url, NAMESPACE), chain_of(3), 1000.0)
        open_store(url, OTHER)
        write_unreadable(tmp_path / "store", FORMAT_VERSION + 1, 10, 2000.0)
        found = {one.fingerprint: one for one in whole.find()}
        assert found.keys() == {NAMESPACE.fingerprint, OTHER.fingerprint, "abc"}
        mine = found[NAMESPACE.fingerprint]
        assert (mine.namespace, mine.num_objects, mine.used_first_s) == (NAMESPACE, 1, 1000.0)
        assert (found["abc"].namespace, found["abc"].num_bytes) == (None, 10)
        assert found[OTHER.fingerprint].num_objects == 0
        ours = {found[one.fingerprint].folder for one in (NAMESPACE, OTHER)}
        assert whole.deletable(found.values()).keys() == ours

    @pytest.mark.parametrize("text", [b"", b"{}", b"\xff", OTHER.to_json().encode()])
    def test_a_description_that_does_not_fit_makes_a_namespace_unreadable(
        self, url: str, text: bytes
    ) -> None:
        store = open_store(url, NAMESPACE)
        Path(object_path(store, "namespace.json")).write_bytes(text)
        assert [found.namespace for found in WholeStore(url).find()] == [None]

    def test_removing_a_namespace_leaves_nothing_of_it(self, url: str, tmp_path: Path) -> None:
        store = open_store(url, NAMESPACE)
        write_at(store, chain_of(3), 1000.0)
        write_at(open_store(url, OTHER), chain_of(3), 1000.0)
        WholeStore(url).remove(NAMESPACE)
        assert [found.namespace for found in WholeStore(url).find()] == [OTHER]
        assert os.listdir(tmp_path / "store" / f"v{FORMAT_VERSION}") == [OTHER.fingerprint]


class TestVerifying:
    @pytest.fixture
    def store(self, url: str) -> FsBlockStore:
        store = open_store(url, NAMESPACE)
        for chain in chains(3, num_blocks=5):
            store.write(run_of(chain))
        return store

    def checked(self, store: FsBlockStore) -> list[CheckedObject]:
        return list(WholeStore(store.url).verify(NAMESPACE))

    def path(self, store: FsBlockStore) -> Path:
        """The object of the first chain."""
        first = chains(1)[0].hashes[0].hex()
        return Path(object_path(store, f"{first[:2]}/{first}.arrow"))

    def test_a_sound_store(self, store: FsBlockStore) -> None:
        found = self.checked(store)
        assert [(one.num_blocks, one.fault) for one in found] == [(5, None)] * 3
        assert sum(one.num_bytes for one in found) == stored_bytes(store.url)

    def test_a_flipped_bit_anywhere_in_a_block(self, store: FsBlockStore) -> None:
        path = self.path(store)
        data = bytearray(path.read_bytes())
        third = data.index(payload_of(chains(1)[0].hashes[2]))
        data[third + 7] ^= 4
        path.write_bytes(data)
        (bad,) = [one for one in self.checked(store) if one.fault]
        assert (bad.num_blocks, bad.fault) == (2, "block 2 of 5 is cut or damaged")
        assert path.name in bad.name
        assert path.exists()

    @pytest.mark.parametrize("num_bytes", [0, 10, 4200])
    def test_a_cut_object(self, store: FsBlockStore, num_bytes: int) -> None:
        os.truncate(self.path(store), num_bytes)
        faults = [one.fault for one in self.checked(store)]
        assert sum(fault is not None for fault in faults) == 1

    def test_an_object_under_another_name(self, store: FsBlockStore) -> None:
        path = self.path(store)
        other = "00" * 32
        target = Path(object_path(store, f"00/{other}.arrow"))
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        (bad,) = [one for one in self.checked(store) if one.fault]
        assert "holds the run that begins with" in str(bad.fault)
