"""The block index against the simplest model of it, a dict of sets; its bounds; its keys."""

import random
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from actors.routing.block_tables import BlockTables
from actors.routing.index import KEY_BITS, BlockIndex, routing_keys
from shared_cache.hashing import ReuseScope, block_hashes

HOLDERS = ("replica-0", "replica-1", "host-0", "shared")
# Three prompts that share beginnings, as conversations do.
ROOT = list(range(100, 140))
CHAINS = ([*ROOT, *range(200, 260)], [*ROOT[:7], *range(300, 311)], list(range(400, 403)))
chains = st.sampled_from(CHAINS)
holders = st.sampled_from(HOLDERS)


class IndexMachine(RuleBasedStateMachine):
    """Every holder's chains are closed: no block without those before it, as in a real cache."""

    @initialize(generation_blocks=st.sampled_from((3, 50, 1000)))
    def start(self, generation_blocks):
        self.index = BlockIndex(400, ttl_s=1e9, generation_blocks=generation_blocks)
        self.model: dict[str, set[int]] = {}

    @rule(holder=holders)
    def add_holder(self, holder):
        if len(self.model) or holder:  # also one that is there: it starts afresh
            self.index.add_holder(holder)
            self.model[holder] = set()

    @rule(holder=holders)
    def remove_holder(self, holder):
        self.index.remove_holder(holder)
        self.model.pop(holder, None)

    @rule(holder=holders, chain=chains, length=st.integers(0, 100))
    def add(self, holder, chain, length):
        self.index.add(holder, chain[:length])
        if holder in self.model:
            self.model[holder].update(chain[:length])

    @rule(holder=holders, chain=chains, length=st.integers(0, 100))
    def book(self, holder, chain, length):
        keys = chain[:length]
        self.index.book(holder, keys, self.index.match(keys))
        while not self.index.tidy(0.0):
            pass
        if holder in self.model:
            self.model[holder].update(keys)

    @rule(holder=holders, chain=chains, first=st.integers(0, 100))
    def evict(self, holder, chain, first):
        """A cache evicts a block after all that follow it, in whatever chain."""
        gone = set(chain[first:])
        gone.update(*(one[one.index(key) :] for one in CHAINS for key in gone if key in one))
        self.index.remove(holder, sorted(gone))
        if holder in self.model:
            self.model[holder] -= gone

    @rule(max_blocks=st.integers(0, 50))
    def tidy(self, max_blocks):
        self.index.tidy(0.0, max_blocks)

    @invariant()
    def it_says_what_the_model_says(self):
        if not hasattr(self, "index"):
            return
        for chain in CHAINS:
            depths = {
                one: len(list(takewhile(held.__contains__, chain)))
                for one, held in self.model.items()
            }
            assert self.index.match(chain) == {one: n for one, n in depths.items() if n}
        for one in HOLDERS:
            held = self.model.get(one, set())
            assert self.index.num_blocks(one) == len(held)
            assert set(self.index.keys_of(one)) == held


IndexMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25)
TestIndexMachine = IndexMachine.TestCase


@settings(max_examples=20)
@given(st.lists(st.tuples(holders, st.integers(0, 400), st.booleans()), max_size=60))
def test_without_room_it_only_ever_believes_too_little(steps):
    index = BlockIndex(60, generation_blocks=8)
    model = {one: set() for one in HOLDERS}
    for one in HOLDERS:
        index.add_holder(one)
    for holder, start, is_booked in steps:
        chain = list(range(start * 1000, start * 1000 + 20))
        if is_booked:
            index.book(holder, chain, index.match(chain))
        else:
            index.add(holder, chain)
        model[holder].update(chain)
        index.tidy(0.0)
        assert index.match(chain).get(holder) == 20  # what was added last is there
        assert all(set(index.keys_of(one)) <= model[one] for one in HOLDERS)
        assert all(index.num_blocks(one) == len(set(index.keys_of(one))) for one in HOLDERS)
    assert len(index) <= 60 + 2 * 20 + 8


def test_what_is_not_used_expires_and_what_is_used_does_not():
    index = BlockIndex(1000, ttl_s=100)
    index.add_holder("a")
    used, idle = list(range(10)), list(range(50, 60))
    index.add("a", used)
    index.add("a", idle)
    for now_s in range(0, 1000, 50):
        index.book("a", used, index.match(used))
        index.tidy(now_s)
    assert index.match(used) == {"a": 10}
    assert index.match(idle) == {}
    assert index.num_blocks("a") == 10


def test_a_holder_that_leaves_and_one_that_takes_its_place_share_nothing():
    index = BlockIndex(30, generation_blocks=10)
    for turn in range(200):
        name = f"replica-{turn}"
        index.add_holder(name)
        chain = list(range(turn * 100, turn * 100 + 5))
        assert index.match(chain) == {}
        index.add(name, chain)
        assert index.match(chain) == {name: 5}
        index.remove_holder(name)
        assert index.match(chain) == {}
    assert index.holders == ()


def test_unknown_holders_and_empty_chains_are_no_error():
    index = BlockIndex()
    index.add("nobody", [1])
    index.remove("nobody", [1])
    index.book("nobody", [1], {})
    index.remove_holder("nobody")
    assert index.match([]) == {}
    assert index.match([1]) == {}
    assert index.num_blocks("nobody") == 0
    assert 1 not in index


def test_a_hole_before_a_block_that_is_there_counts_as_there():
    index = BlockIndex()
    index.add_holder("a")
    index.add("a", [1, 2, 3, 4, 5])
    index.remove("a", [3])
    assert index.match([1, 2, 3, 4, 5]) == {"a": 5}
    assert index.match([1, 2, 3]) == {"a": 2}


def test_keys_are_the_beginnings_of_hashes_and_differ_between_tenants():
    tokens = list(range(64))
    hashes = block_hashes(tokens, 4)
    keys = routing_keys(hashes)
    assert [key % 2**56 for key in keys] == [int.from_bytes(h[:7], "little") for h in hashes]
    assert max(keys) < 2**KEY_BITS
    assert list(routing_keys(hashes, 4)) == list(keys)[3::4]
    assert list(routing_keys(hashes[:3], 4)) == []
    other = routing_keys(block_hashes(tokens, 4, ReuseScope("another tenant")))
    assert not set(keys) & set(other)


@pytest.mark.parametrize("seed", [1, 2])
def test_tables_keep_the_newest_and_stay_within_their_room(seed):
    rng = random.Random(seed)
    tables = BlockTables(3000, generation_blocks=100)
    written = [rng.getrandbits(KEY_BITS) for _ in range(20_000)]
    for start in range(0, len(written), 50):
        tables.write_new(written[start : start + 50], 1)
        tables.tidy(1000)
    assert 2500 < len(tables) < 3500
    assert all(tables.get(key) for key in written[-1500:])
    assert not any(tables.get(key) for key in written[:10_000])
    assert sum(tables.take_dropped().values()) == 20_000 - len(tables)
