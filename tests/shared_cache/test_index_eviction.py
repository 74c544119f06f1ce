"""Who makes room for whom, and in which order."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared_cache.eviction import (
    MAX_REFUSED,
    EvictionPolicy,
    PolicyName,
    make_policy,
)
from shared_cache.hashing import BlockHash
from shared_cache.host.blocks import SEARCH_PAUSE_S
from shared_cache.host.index import Clock, IndexRules
from shared_cache.host.interface import Retention
from tests.shared_cache.arena_fakes import (
    HASHES,
    LIMITED,
    A,
    Arena,
    B,
    FakeJournal,
    make_index,
    put,
    run_of,
)
from tests.shared_cache.fakes import FakeClock


class TestQuotas:
    def test_a_tenant_at_its_quota_makes_room_by_its_own_blocks(self) -> None:
        arena = Arena(num_slots=16, quota_blocks=3)
        arena.put_idle(run_of(stop=2))
        arena.put_idle(run_of(stop=3, scope=LIMITED))
        newer = run_of(stop=2, first_token=500, scope=LIMITED)
        arena.put_idle(newer)
        kept = run_of(stop=1, scope=LIMITED).hashes
        assert arena.names == {*HASHES[:2], *kept, *newer.hashes}

    def test_what_is_beyond_the_quota_is_not_published_and_its_slots_are_free(self) -> None:
        arena = Arena(num_slots=8, quota_blocks=3)
        run = run_of(stop=5, scope=LIMITED)
        grant = arena.put(A, run)
        assert arena.names == set(run.hashes[:3])
        assert len(grant.slots) == 3
        assert arena.index.stats(0).free_slots == 5
        other = arena.put(B, run_of(stop=2, first_token=500, scope=LIMITED))
        assert other.slots == ()  # all of the quota is leased
        assert arena.index.stats(0).reserved_slots == 0

    def test_a_run_is_not_evicted_to_make_room_for_its_own_end(self) -> None:
        arena = Arena(quota_blocks=3)
        arena.put_idle(run_of(stop=3, scope=LIMITED))
        longer = run_of(3, 5, scope=LIMITED)
        arena.put(A, longer)
        assert arena.names == set(run_of(stop=3, scope=LIMITED).hashes)

    def test_what_went_is_not_counted_any_more(self) -> None:
        arena = Arena(quota_blocks=2)
        arena.put_idle(run_of(stop=2, scope=LIMITED))
        arena.index.drop(0, run_of(stop=2, scope=LIMITED).hashes)
        assert len(arena.put(A, run_of(stop=2, first_token=500, scope=LIMITED)).slots) == 2

    def test_a_quota_spans_namespaces(self) -> None:
        arena = Arena(quota_blocks=3, block_units=(1, 2))
        run = run_of(stop=3, scope=LIMITED)
        arena.put_idle(run)
        grant = arena.put(A, run, namespace=1)
        assert len(grant.slots) == 1
        assert [u.namespace for u in arena.journal.used.values()] == [0, 1]

    def test_reserved_slots_are_nobodys(self) -> None:
        arena = Arena(quota_blocks=2)
        arena.index.claim(B, 0, run_of(stop=4, first_token=500, scope=LIMITED).hashes)
        assert len(arena.put(A, run_of(stop=2, scope=LIMITED)).slots) == 2

    @pytest.mark.parametrize("is_limited_colder", [True, False])
    def test_for_others_the_group_with_the_coldest_blocks_makes_room(
        self, is_limited_colder: bool
    ) -> None:
        arena = Arena(num_slots=6, quota_blocks=3)
        limited, other = run_of(stop=3, scope=LIMITED), run_of(stop=3)
        runs = [limited, other] if is_limited_colder else [other, limited]
        for run in runs:
            arena.put_idle(run)
        assert len(arena.index.reserve(B, 0, 3)) == 3
        assert arena.names >= set(runs[1].hashes[:2])
        assert arena.index.stats(0).evicted_blocks == 3

    def test_a_warm_group_gives_only_until_that_shows(self) -> None:
        arena = Arena(num_slots=6, quota_blocks=3)
        for run in (run_of(stop=3), run_of(stop=3, scope=LIMITED)):
            arena.put_idle(run)
        arena.index.release(A, arena.index.lease(A, 0, HASHES, 0).slots)
        for _ in range(4):
            arena.index.reserve(B, 0, 1)
        assert arena.names == set(HASHES[:2])


class TestEviction:
    @pytest.mark.parametrize("policy", ["lru", "s3fifo", "priority"])
    def test_all_that_nobody_keeps_can_go(self, policy: PolicyName) -> None:
        clock, journal = FakeClock(), FakeJournal(60)
        rules = IndexRules(lambda clock: make_policy(policy, clock))
        index = make_index(rules, journal, clock, 1)
        index.open_namespace("n", 4096)
        index.attach(A, 0)
        for position in range(30):  # one by one, as an answer grows
            index.release(A, put(index, A, 0, run_of(position, position + 1)).slots)
            late = run_of(position, position + 1, first_token=500)
            index.release(A, put(index, A, 0, late).slots)
        assert len(index.reserve(A, 0, 50)) == 50

    def test_a_cold_answer_goes_whole_and_from_its_end_before_a_warm_one(self) -> None:
        """Blocks that came one by one are offered first block first; they still go as one run."""
        arena = Arena(num_slots=8)
        for position in range(4):
            arena.put_idle(run_of(position, position + 1))
        warm = run_of(stop=4, first_token=500)
        arena.put_idle(warm)
        for num_left in (3, 2, 1, 0):
            arena.index.reserve(A, 0, 1)
            assert arena.names == {*HASHES[:num_left], *warm.hashes}

    def test_an_answer_that_was_used_again_is_not_eaten_up(self) -> None:
        arena = Arena(num_slots=8)
        for position in range(4):
            arena.put_idle(run_of(position, position + 1))
        other = run_of(stop=4, first_token=500)
        arena.put_idle(other)
        arena.index.reserve(A, 0, 1)
        arena.index.release(B, arena.index.lease(B, 0, HASHES[:3], 0).slots)
        arena.index.reserve(A, 0, 4)
        assert arena.names == set(HASHES[:3])

    def test_what_was_next_to_go_may_have_gone_and_come_back(self) -> None:
        arena = Arena(num_slots=8)
        for position in range(4):
            arena.put_idle(run_of(position, position + 1))
        other = run_of(stop=4, first_token=500)
        arena.put_idle(other)
        arena.index.reserve(A, 0, 1)  # the last one goes, the third one is next
        arena.index.drop(0, HASHES[2:3])
        arena.put_idle(run_of(2, 3))
        arena.index.reserve(A, 0, 1)
        assert arena.names == {*HASHES[:3], *other.hashes[:3]}

    def test_parents_of_another_tenant_stay_in_their_own_group(self) -> None:
        arena = Arena(num_slots=4, quota_blocks=4)
        arena.put_idle(run_of(stop=1))
        arena.put_idle(run_of(1, 2))
        arena.put_idle(replace(run_of(2, 4), tenant=LIMITED.tenant))
        for num_left in (2, 0):  # the other group's turn comes with the next call
            assert len(arena.index.reserve(A, 0, 4)) == 2
            assert arena.names == set(HASHES[:num_left])

    @pytest.mark.parametrize("policy", ["lru", "s3fifo", "priority"])
    @pytest.mark.parametrize("keep", ["pin", "freeze"])
    def test_kept_blocks_are_not_all_searched_but_what_may_go_is_found(
        self, policy: PolicyName, keep: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        num_kept = 4 * MAX_REFUSED
        clock, journal = FakeClock(), FakeJournal(num_kept + 3)
        offers = 0

        def counting(clock: Clock) -> EvictionPolicy:
            made = make_policy(policy, clock)
            evict = made.evict

            def count_offers(num_blocks: int, try_evict: Callable[[BlockHash], bool]) -> int:
                def count(block_hash: BlockHash) -> bool:
                    nonlocal offers
                    offers += 1
                    return try_evict(block_hash)

                return evict(num_blocks, count)

            monkeypatch.setattr(made, "evict", count_offers)
            return made

        rules = IndexRules(counting)
        index = make_index(rules, journal, clock, 1)
        index.open_namespace("n", 4096)
        index.attach(A, 0)
        kept, free = run_of(stop=num_kept), run_of(stop=3, first_token=10**6)
        grant = put(index, A, 0, kept)
        index.release(A, grant.slots)
        if keep == "pin":
            index.pin(0, kept.hashes, 3600)
        else:  # as the owner finds them after a crash
            index = make_index(rules, journal, clock, 1)
            index.open_namespace("n", 4096)
            index.adopt_extent(0, 0)
            for slot, used in journal.used.items():
                index.adopt(0, slot, used.record)
            index.attach(A, 0)
        index.release(A, put(index, A, 0, free).slots)
        index.lease(A, 0, kept.hashes[:20], 0)
        found = 0
        for _ in range(12):
            offers = 0
            num_found = len(index.reserve(A, 0, 1))
            assert offers <= MAX_REFUSED + 1
            if not num_found:
                assert index.reserve(A, 0, 1) == ()
                assert offers <= MAX_REFUSED + 1, "a search for nothing is followed by a pause"
            found += num_found
            clock.now_s += SEARCH_PAUSE_S
        assert found == 3

    def test_a_pin_holds_until_its_time_is_over(self) -> None:
        arena = Arena(num_slots=4)
        arena.put_idle(run_of(stop=4))
        assert arena.index.pin(0, HASHES[:2], ttl_s=10) == 2
        assert arena.index.pin(0, HASHES[:2], ttl_s=5) == 2
        arena.clock.now_s += 9
        assert len(arena.index.reserve(A, 0, 4)) == 2
        arena.clock.now_s += 1
        assert len(arena.index.reserve(A, 0, 4)) == 2

    def test_retention_reaches_the_policy(self) -> None:
        clock, journal = FakeClock(), FakeJournal(4)
        rules = IndexRules(lambda clock: make_policy("priority", clock))
        index = make_index(rules, journal, clock, 1)
        index.open_namespace("n", 4096)
        index.attach(A, 0)
        precious = replace(run_of(stop=2), retention=Retention(priority=90))
        for run in (precious, run_of(stop=2, first_token=500)):
            index.release(A, put(index, A, 0, run).slots)
        index.reserve(A, 0, 2)
        assert {u.record.block_hash for u in journal.used.values()} == set(precious.hashes)
