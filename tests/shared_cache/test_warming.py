"""Warming: the hottest prefixes, whole, into memory that is free."""

import pytest

from shared_cache.hashing import BlockHash, BlockHashChain
from shared_cache.host.local import LocalHostTier
from shared_cache.stores.store import MemoryBlockStore, StoredRun
from shared_cache.upkeep.warming import StoredPrefix, hottest_prefixes, warm_prefix
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, payload_of, run_of

PAGE_BYTES = 4096


def make_run(chain: BlockHashChain, first: int, end: int, used_s: float) -> StoredRun:
    hashes = tuple(chain.hashes[first:end])
    return StoredRun(hashes[0].hex(), chain.parent_of(first), hashes, 1, used_s)


def prefix_of(chain: BlockHashChain) -> StoredPrefix:
    return StoredPrefix(chain.parent_of(0), tuple(chain.hashes))


class TestHottestPrefixes:
    one, other = chain_of(8), chain_of(8, first_token=1000)

    def test_last_used_first_each_from_its_first_block_on(self) -> None:
        runs = [
            make_run(self.one, 0, 4, 10.0),
            make_run(self.one, 4, 8, 30.0),
            make_run(self.other, 0, 8, 20.0),
        ]
        found = list(hottest_prefixes(runs, 99))
        assert found == [prefix_of(self.one), prefix_of(self.other)]

    def test_overlapping_runs_give_every_block_once(self) -> None:
        runs = [make_run(self.one, 0, 5, 30.0), make_run(self.one, 3, 8, 20.0)]
        first, second = hottest_prefixes(runs, 99)
        assert first.hashes == tuple(self.one.hashes[:5])
        assert second.hashes == tuple(self.one.hashes)

    @pytest.mark.parametrize(("max_blocks", "lengths"), [(0, []), (3, [3]), (8, [8]), (10, [8, 2])])
    def test_no_more_blocks_than_there_is_room_for(
        self, max_blocks: int, lengths: list[int]
    ) -> None:
        runs = [make_run(self.one, 0, 8, 30.0), make_run(self.other, 0, 8, 20.0)]
        assert [len(p.hashes) for p in hottest_prefixes(runs, max_blocks)] == lengths

    def test_forged_runs_in_a_circle_come_to_an_end(self) -> None:
        a, b = BlockHash(b"a" * 32), BlockHash(b"b" * 32)
        circle = [StoredRun("1", b, (a,), 10, 5.0), StoredRun("2", a, (b,), 10, 4.0)]
        assert [p.hashes for p in hottest_prefixes(circle, 99)] == [(b, a)]


class TestWarmPrefix:
    chain = chain_of(40)

    @pytest.fixture
    def store(self) -> MemoryBlockStore:
        store = MemoryBlockStore(NAMESPACE)
        store.write(run_of(self.chain))
        return store

    def host(self, num_slots: int = 64) -> LocalHostTier:
        return LocalHostTier(num_slots * PAGE_BYTES, BLOCK_BYTES)

    def check(self, host: LocalHostTier, num_blocks: int) -> None:
        lease = host.lease(self.chain.hashes)
        found = [bytes(host.buffer(slot)) for slot in lease.slots]
        assert found == [payload_of(h) for h in self.chain.hashes[:num_blocks]]
        assert not lease.to_store  # they are in the store
        host.release(lease)
        stats = host.stats()
        assert (stats.leased_slots, stats.reserved_slots) == (0, 0)

    def test_all_blocks_are_there_verified_and_unleased(self, store: MemoryBlockStore) -> None:
        host = self.host()
        assert warm_prefix(host, store, prefix_of(self.chain), is_shared=True) == 40
        self.check(host, 40)

    def test_what_is_there_already_is_not_read_again(self, store: MemoryBlockStore) -> None:
        host = self.host()
        warm_prefix(host, store, prefix_of(chain_of(10)), is_shared=True)
        for run in list(store.entries())[:10]:
            store.delete(run.name)
        assert warm_prefix(host, store, prefix_of(self.chain), is_shared=True) == 40
        self.check(host, 40)

    def test_it_ends_where_the_store_has_no_more(self, store: MemoryBlockStore) -> None:
        host = self.host()
        store.delete(self.chain.hashes[35].hex())
        assert warm_prefix(host, store, prefix_of(self.chain), is_shared=True) == 35
        self.check(host, 35)

    def test_it_ends_where_memory_is_full(self, store: MemoryBlockStore) -> None:
        host = self.host(num_slots=16)
        slots = host.reserve(6)  # a replica is writing
        assert warm_prefix(host, store, prefix_of(self.chain), is_shared=True) == 10
        host.cancel(slots)
        self.check(host, 10)

    def test_blocks_of_another_store_are_left_to_be_stored(self, store: MemoryBlockStore) -> None:
        host = self.host()
        assert warm_prefix(host, store, prefix_of(self.chain), is_shared=False) == 40
        lease = host.lease(self.chain.hashes)
        assert lease.to_store == tuple(range(40))
        host.release(lease)
        assert warm_prefix(host, store, prefix_of(self.chain), is_shared=False) == 40

    def test_pinned_blocks_are_not_pushed_out(self, store: MemoryBlockStore) -> None:
        host = self.host(num_slots=16)
        short = chain_of(10)
        assert warm_prefix(host, store, prefix_of(short), pin_s=3600.0) == 10
        assert len(host.reserve(16)) == 6
        lease = host.lease(short.hashes)
        assert len(lease.slots) == 10

    def test_a_store_that_fails_leaves_nothing_reserved(self, store: MemoryBlockStore) -> None:
        def fail(*_: object) -> tuple[int, ...]:
            raise RuntimeError("the store is away")

        host = self.host()
        store.read_into = fail
        with pytest.raises(RuntimeError):
            warm_prefix(host, store, prefix_of(self.chain))
        self.check(host, 0)
