"""Routing decisions: views in, choice out; and what the index believes."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.routing import (
    POLICY_NAMES,
    PrefixIndex,
    PromptView,
    ReplicaView,
    WorkModel,
    make_policy,
)
from shared_cache.hashing import BlockHash, block_hashes

WORK = WorkModel(fetch_cost=0.1, outstanding_cost=10.0)


def choose(policy_name, prompt, *views, seed=0):
    return make_policy(policy_name, WORK, random.Random(seed)).choose(prompt, views).replica_id


@pytest.mark.parametrize(
    ("views", "shared", "expected"),
    [
        pytest.param([("a", 0, 0, 0), ("b", 0, 0, 512)], 0, "b", id="longest prefix"),
        pytest.param([("a", 0, 0, 0), ("b", 600, 1, 512)], 0, "a", id="too busy for its prefix"),
        pytest.param([("a", 0, 0, 0), ("b", 400, 1, 512)], 0, "b", id="busy, but worth it"),
        pytest.param([("a", 0, 0, 0), ("b", 400, 1, 512)], 512, "a", id="a fetch is cheap"),
        pytest.param([("a", 0, 0, 0), ("b", 0, 0, 512)], 512, "b", id="a fetch is not free"),
        pytest.param([("a", 0, 3, 0), ("b", 0, 0, 20)], 0, "b", id="running requests count"),
        pytest.param([("a", 10, 1, 0), ("b", 0, 2, 0)], 0, "a", id="tie: fewest outstanding"),
    ],
)
def test_prefix_policy_minimises_predicted_work(views, shared, expected):
    candidates = [ReplicaView(*view) for view in views]
    assert choose("prefix", PromptView(1000, shared), *candidates) == expected


def test_equal_replicas_are_chosen_at_random_and_reproducibly():
    views = [ReplicaView("a"), ReplicaView("b")]
    picks = [choose("prefix", PromptView(10), *views, seed=seed) for seed in range(40)]
    assert set(picks) == {"a", "b"}
    assert picks == [choose("prefix", PromptView(10), *views, seed=seed) for seed in range(40)]


def test_round_robin_takes_turns_and_survives_a_change_of_members():
    policy = make_policy("round_robin", WORK, random.Random(0))
    abc = [ReplicaView(name) for name in "cab"]
    assert [policy.choose(PromptView(1), abc).replica_id for _ in range(4)] == list("abca")
    assert policy.choose(PromptView(1), abc[:1]).replica_id == "c"
    assert policy.choose(PromptView(1), abc).replica_id == "a"


def test_least_outstanding_ignores_prefixes():
    views = [ReplicaView("a", 0, 2, 1000), ReplicaView("b", 5000, 1, 0)]
    assert choose("least_outstanding", PromptView(1000), *views) == "b"


def test_random_is_even():
    policy = make_policy("random", WORK, random.Random(1))
    views = [ReplicaView("a"), ReplicaView("b", 9999, 9, 0)]
    counts = Counter(policy.choose(PromptView(1), views).replica_id for _ in range(400))
    assert min(counts.values()) > 150


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_chooses_a_candidate(name):
    assert choose(name, PromptView(1), ReplicaView("only")) == "only"


def chain(*tokens: int) -> list[BlockHash]:
    return list(block_hashes(tokens, 1))


def test_index_knows_common_prefixes_per_holder():
    index = PrefixIndex()
    index.add_holder("a", 100)
    index.add_holder("b", 100)
    index.add("a", chain(1, 2, 3))
    index.add("nobody", chain(9))
    assert index.depth("a", chain(1, 2, 9)) == 2
    assert index.depth("a", chain(2, 3)) == 0
    assert index.depth("b", chain(1, 2)) == 0
    assert index.depth("nobody", chain(9)) == 0
    index.add_holder("a", 100)
    assert index.depth("a", chain(1)) == 0


def test_index_forgets_the_least_recently_used_tail_first():
    index = PrefixIndex()
    index.add_holder("a", 3)
    index.add("a", chain(1, 2, 3))
    index.add("a", chain(7))
    assert index.depth("a", chain(1, 2, 3)) == 2
    assert index.depth("a", chain(7)) == 1


def test_index_forgets_a_block_with_all_that_follow_it_and_nothing_else():
    index = PrefixIndex()
    index.add_holder("a", 100)
    for one in (chain(1, 2, 3), chain(1, 2, 4), chain(1, 5), chain(6)):
        index.add("a", one)
    index.forget("a", chain(1, 2)[-1])
    index.forget("a", chain(1, 9)[-1])
    index.forget("nobody", chain(1)[0])
    assert index.num_blocks("a") == 3
    index.add("a", chain(1, 2))
    assert [index.depth("a", chain(*one)) for one in ((1, 2, 3), (1, 2, 4), (1, 5), (6,))] == [
        2,
        2,
        2,
        1,
    ]


class ModelIndex:
    """The simplest index: a dict, least recently used first, whose keys are token prefixes."""

    def __init__(self, capacity: int) -> None:
        self.blocks: dict[tuple[int, ...], None] = {}
        self.capacity = capacity

    def add(self, tokens: tuple[int, ...]) -> None:
        for end in range(len(tokens), 0, -1):
            self.blocks.pop(tokens[:end], None)
            self.blocks[tokens[:end]] = None
        while len(self.blocks) > self.capacity:
            del self.blocks[next(iter(self.blocks))]

    def forget(self, tokens: tuple[int, ...]) -> None:
        self.blocks = {k: None for k in self.blocks if k[: len(tokens)] != tokens}

    def depth(self, tokens: tuple[int, ...]) -> int:
        ends = range(1, len(tokens) + 1)
        return next((end - 1 for end in ends if tokens[:end] not in self.blocks), len(tokens))


SEQUENCE = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@given(st.lists(st.tuples(st.booleans(), SEQUENCE), max_size=30), st.integers(1, 12))
def test_halving_finds_what_a_scan_finds(steps, capacity):
    index, model = PrefixIndex(), ModelIndex(capacity)
    index.add_holder("a", capacity)
    for forgets, sequence in steps:
        if forgets:
            index.forget("a", chain(*sequence)[-1])
            model.forget(sequence)
        else:
            index.add("a", chain(*sequence))
            model.add(sequence)
        assert index.num_blocks("a") == len(model.blocks)
        for _, probe in steps:
            assert index.depth("a", chain(*probe)) == model.depth(probe)
