from collections.abc import Callable, Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared_cache.eviction import (
    MAX_REFUSED,
    EvictionPolicy,
    LruPolicy,
    PolicyName,
    PriorityPolicy,
    S3FifoPolicy,
    make_policy,
)
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import DEFAULT_PRIORITY, Retention
from tests.shared_cache.fakes import FakeClock, chain_of

NAMES: list[PolicyName] = ["lru", "s3fifo", "priority"]


@pytest.fixture(params=NAMES)
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return make_policy(request.param, FakeClock())


def blocks(count: int, first: int = 0) -> list[BlockHash]:
    """Names of blocks that are no chain: only the tests of runs care."""
    return [BlockHash(number.to_bytes(32, "big")) for number in range(first, first + count)]


def evicted(policy: EvictionPolicy, num_blocks: int | None = None) -> list[BlockHash]:
    """What goes, in order, when everything may go; all by default."""
    taken: list[BlockHash] = []
    wanted = len(policy) if num_blocks is None else num_blocks
    assert policy.evict(wanted, lambda h: taken.append(h) is None) == len(taken)
    return taken


def offered(policy: EvictionPolicy, refused: Callable[[BlockHash], bool]) -> list[BlockHash]:
    """What is offered, in order, in a pass that wants everything."""
    seen: list[BlockHash] = []

    def try_evict(block_hash: BlockHash) -> bool:
        seen.append(block_hash)
        return not refused(block_hash)

    policy.evict(len(policy), try_evict)
    return seen


class TestEveryPolicy:
    def test_last_block_of_a_run_goes_first(self, policy: EvictionPolicy) -> None:
        hashes = chain_of(3).hashes
        policy.inserted(hashes)
        assert evicted(policy) == hashes[::-1]

    def test_takes_no_more_than_it_was_asked_for(self, policy: EvictionPolicy) -> None:
        policy.inserted(blocks(5))
        assert len(evicted(policy, 2)) == 2
        assert len(policy) == 3
        assert evicted(policy, 0) == []

    def test_a_refused_block_stays_and_is_offered_once_a_pass(self, policy: EvictionPolicy) -> None:
        hashes = blocks(6)
        policy.inserted(hashes)
        policy.accessed(hashes[:4])
        leased = {hashes[1], hashes[5]}
        assert sorted(offered(policy, leased.__contains__)) == hashes
        assert len(policy) == 2
        assert set(evicted(policy)) == leased
        assert len(policy) == 0

    def test_leased_blocks_do_not_slow_down_every_call(self, policy: EvictionPolicy) -> None:
        leased = blocks(1000)
        policy.inserted(leased)
        policy.inserted(blocks(1000, first=1000))
        may_stay, num_offers = set(leased), 0

        def try_evict(block_hash: BlockHash) -> bool:
            nonlocal num_offers
            num_offers += 1
            return block_hash not in may_stay

        assert sum(policy.evict(1, try_evict) for _ in range(500)) == 500
        assert num_offers <= len(leased) + 500

    def test_a_search_is_bounded_and_the_next_one_goes_on_behind_it(
        self, policy: EvictionPolicy
    ) -> None:
        kept, free = blocks(3 * MAX_REFUSED), blocks(5, first=10**6)
        policy.inserted(free)
        policy.accessed(free)
        policy.inserted(kept)
        policy.accessed(kept[:10])
        may_stay, num_offers, num_evicted = set(kept), [], 0
        for _ in range(5):
            num_offers.append(0)

            def try_evict(block_hash: BlockHash) -> bool:
                num_offers[-1] += 1
                return block_hash not in may_stay

            num_evicted += policy.evict(5, try_evict)
        assert max(num_offers) <= MAX_REFUSED + 5
        assert num_evicted == 5

    def test_a_run_that_was_refused_still_goes_from_its_end(self, policy: EvictionPolicy) -> None:
        hashes = blocks(4)
        policy.inserted(hashes)
        policy.evict(4, lambda _: False)
        assert evicted(policy) == hashes[::-1]

    def test_a_later_turn_goes_before_the_turns_it_builds_on(self, policy: EvictionPolicy) -> None:
        chain = blocks(6)
        policy.inserted(chain[:3])
        policy.inserted(chain[3:])
        here = list(chain)

        def is_leaf(block_hash: BlockHash) -> bool:
            if block_hash != here[-1]:
                return False
            here.pop()
            return True

        while here:
            assert policy.evict(1, is_leaf) == 1

    def test_removed_blocks_are_never_offered_and_unknown_ones_are_a_bug(
        self, policy: EvictionPolicy
    ) -> None:
        hashes = blocks(3)
        policy.inserted(hashes)
        policy.removed(hashes[1])
        with pytest.raises(KeyError):
            policy.removed(hashes[1])
        assert len(policy) == 2
        assert evicted(policy) == [hashes[2], hashes[0]]
        with pytest.raises(KeyError):
            policy.accessed(hashes[:1])

    def test_an_error_of_the_tier_loses_no_block(self, policy: EvictionPolicy) -> None:
        hashes = blocks(4)
        policy.inserted(hashes)

        def fail_at_the_second_block(block_hash: BlockHash) -> bool:
            if block_hash == hashes[2]:
                raise OSError("the journal cannot be written")
            return False

        with pytest.raises(OSError, match="journal"):
            policy.evict(4, fail_at_the_second_block)
        assert sorted(evicted(policy)) == hashes


class TestLru:
    def test_what_was_asked_for_last_goes_last(self) -> None:
        old, new = blocks(2), blocks(2, first=2)
        policy = LruPolicy()
        policy.inserted(old)
        policy.inserted(new)
        policy.accessed(old)
        assert evicted(policy) == [*new[::-1], *old[::-1]]


class TestS3Fifo:
    def filled(self) -> tuple[S3FifoPolicy, list[BlockHash]]:
        """A policy with ten blocks that were hit twice, and one in the small queue; the ten."""
        policy, valued = S3FifoPolicy(), blocks(10)
        policy.inserted(valued)
        for _ in range(2):
            policy.accessed(valued)
        policy.inserted(blocks(2, first=100))
        assert evicted(policy, 1) == blocks(1, first=101)
        return policy, valued

    def flood(self, policy: S3FifoPolicy, num_blocks: int) -> list[BlockHash]:
        """Insert blocks that never come back, each in the place of another; what went."""
        gone: list[BlockHash] = []
        for number in range(num_blocks):
            policy.inserted(blocks(1, first=10_000 + number))
            gone += evicted(policy, 1)
        return gone

    def test_a_flood_of_new_blocks_passes_what_was_hit_twice(self) -> None:
        policy, valued = self.filled()
        assert not set(self.flood(policy, 100)) & set(valued)

    def test_hit_once_is_not_enough(self) -> None:
        policy = S3FifoPolicy()
        once, new = blocks(5), blocks(5, first=5)
        policy.inserted(once)
        policy.accessed(once)
        policy.inserted(new)
        assert evicted(policy, 5) == once[::-1]

    @pytest.mark.parametrize(("absence", "is_kept"), [(5, True), (50, False)])
    def test_a_block_that_comes_back_soon_is_kept(self, absence: int, is_kept: bool) -> None:
        policy, _ = self.filled()
        back = blocks(1, first=500)
        policy.inserted(back)
        evicted(policy, 1)
        assert back[0] in self.flood(policy, absence)
        policy.inserted(back)
        assert (back[0] not in self.flood(policy, 10)) is is_kept

    def test_names_are_kept_for_as_many_blocks_as_are_here_at_most(self) -> None:
        policy = S3FifoPolicy()
        policy.inserted(blocks(1000))
        evicted(policy, 400)
        assert policy.num_remembered == 400
        evicted(policy, 500)
        assert policy.num_remembered == len(policy) == 100
        policy.removed(blocks(1)[0])
        assert policy.num_remembered == len(policy) == 99

    def test_a_hit_in_the_main_queue_counts_for_one_more_round(self) -> None:
        policy, valued = self.filled()
        policy.accessed(valued[9:])
        gone = [h for h in evicted(policy) if h in valued]
        assert gone == [*valued[8::-1], valued[9]]


class TestPriority:
    def test_lowest_priority_goes_first_and_the_oldest_within_it(self) -> None:
        policy = PriorityPolicy(FakeClock())
        high, low, usual, later = (blocks(2, first) for first in (0, 2, 4, 6))
        policy.inserted(high, Retention(90))
        policy.inserted(low, Retention(10))
        policy.inserted(usual)
        policy.inserted(later)
        policy.accessed(usual)
        expected = [low, later, usual, high]
        assert evicted(policy) == [h for run in expected for h in run[::-1]]

    def test_a_run_of_several_priorities_is_accessed_as_a_whole(self) -> None:
        policy = PriorityPolicy(FakeClock())
        head, tail, other = blocks(2), blocks(2, 2), blocks(2, 4)
        policy.inserted(head, Retention(90))
        policy.inserted(tail)
        policy.inserted(other)
        policy.accessed([*head, *tail])
        assert evicted(policy) == [*other[::-1], *tail[::-1], *head[::-1]]

    def test_a_priority_ends_and_then_is_the_usual_one(self) -> None:
        clock = FakeClock()
        policy = PriorityPolicy(clock)
        high, low, usual = (blocks(2, first) for first in (0, 2, 4))
        policy.inserted(high, Retention(90, ttl_s=10))
        policy.inserted(low, Retention(10, ttl_s=20))
        policy.inserted(usual)
        clock.now_s += 9.9
        assert offered(policy, lambda _: True)[-2:] == high[::-1]
        clock.now_s += 0.2
        policy.inserted(new := blocks(1, 6))
        assert offered(policy, lambda _: True) == [*low[::-1], *usual[::-1], *new, *high[::-1]]
        clock.now_s += 20
        assert evicted(policy) == [*usual[::-1], *new, *high[::-1], *low[::-1]]

    def test_a_block_that_comes_back_does_not_inherit_the_old_end(self) -> None:
        clock = FakeClock()
        policy = PriorityPolicy(clock)
        block, usual = blocks(1), blocks(1, 1)
        policy.inserted(block, Retention(90, ttl_s=10))
        policy.removed(block[0])
        policy.inserted(block, Retention(90, ttl_s=100))
        clock.now_s += 50
        policy.inserted(usual)
        assert evicted(policy) == [*usual, *block]

    def test_blocks_that_left_long_before_their_end_take_no_memory(self) -> None:
        policy = PriorityPolicy(FakeClock())
        for number in range(10_000):
            policy.inserted(blocks(1, number), Retention(90, ttl_s=1e6))
            evicted(policy, 1)
        assert policy.num_waiting_ends < 100

    def test_the_usual_priority_needs_no_end(self) -> None:
        policy = PriorityPolicy(FakeClock())
        policy.inserted(blocks(3), Retention(DEFAULT_PRIORITY, ttl_s=5))
        assert policy.num_waiting_ends == 0


RETENTIONS = st.builds(
    Retention,
    priority=st.sampled_from([0, DEFAULT_PRIORITY, 80]),
    ttl_s=st.none() | st.floats(0.1, 20),
)


class PolicyMachine(RuleBasedStateMachine):
    """Any policy against a set: prompts share prefixes, some are leased, leaves go first."""

    @initialize(name=st.sampled_from(NAMES))
    def start(self, name: PolicyName) -> None:
        self.clock = FakeClock()
        self.policy = make_policy(name, self.clock)
        self.parent_of: dict[BlockHash, BlockHash | None] = {}
        self.leased: set[BlockHash] = set()
        self.num_made = 0

    def prefix_of(self, block_hash: BlockHash) -> list[BlockHash]:
        chain: list[BlockHash] = []
        current: BlockHash | None = block_hash
        while current is not None:
            chain.append(current)
            current = self.parent_of[current]
        return chain[::-1]

    def any_block(self, data: st.DataObject) -> BlockHash:
        return data.draw(st.sampled_from(sorted(self.parent_of)))

    @rule(data=st.data(), count=st.integers(1, 5), retention=RETENTIONS)
    def insert_run(self, data: st.DataObject, count: int, retention: Retention) -> None:
        parent = data.draw(st.sampled_from([None, *sorted(self.parent_of)]))
        run = blocks(count, self.num_made)
        self.num_made += count
        self.insert(run, parent, retention)

    def insert(
        self, run: Sequence[BlockHash], parent: BlockHash | None, retention: Retention
    ) -> None:
        self.policy.inserted(run, retention)
        self.parent_of.update(zip(run, [parent, *run], strict=False))

    @precondition(lambda self: self.parent_of)
    @rule(data=st.data())
    def access(self, data: st.DataObject) -> None:
        self.policy.accessed(self.prefix_of(self.any_block(data)))

    @precondition(lambda self: self.parent_of)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        self.leased.update(self.prefix_of(self.any_block(data)))

    @rule()
    def release_all(self) -> None:
        self.leased.clear()

    @rule(seconds=st.floats(0, 15))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @precondition(lambda self: self.leaves())
    @rule(data=st.data(), retention=RETENTIONS, comes_back=st.booleans())
    def remove_leaf(self, data: st.DataObject, retention: Retention, comes_back: bool) -> None:
        leaf = data.draw(st.sampled_from(sorted(self.leaves())))
        parent = self.parent_of.pop(leaf)
        self.leased.discard(leaf)
        self.policy.removed(leaf)
        if comes_back:
            self.insert([leaf], parent, retention)

    @rule(num_blocks=st.integers(0, 8))
    def evict_leaves(self, num_blocks: int) -> None:
        seen: list[BlockHash] = []
        gone: list[BlockHash] = []

        def try_evict(block_hash: BlockHash) -> bool:
            assert block_hash in self.parent_of
            assert len(gone) < num_blocks
            seen.append(block_hash)
            if block_hash in self.leased or block_hash not in self.leaves():
                return False
            gone.append(block_hash)
            del self.parent_of[block_hash]
            return True

        num_before = len(self.parent_of)
        assert self.policy.evict(num_blocks, try_evict) == len(gone)
        assert len(set(seen)) == len(seen)
        assert len(gone) == num_blocks or len(seen) == num_before

    @invariant()
    def ranks_what_is_here(self) -> None:
        assert len(self.policy) == len(self.parent_of)

    def leaves(self) -> set[BlockHash]:
        return set(self.parent_of) - set(self.parent_of.values())

    def teardown(self) -> None:
        if hasattr(self, "policy"):
            assert sorted(offered(self.policy, lambda _: True)) == sorted(self.parent_of)
            assert sorted(evicted(self.policy)) == sorted(self.parent_of)


TestPolicyMachine = PolicyMachine.TestCase
