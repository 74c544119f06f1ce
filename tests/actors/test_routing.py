"""Routing decisions: views in, choice out."""

import random
from collections import Counter

import pytest

from actors.routing import (
    POLICY_NAMES,
    ClusterView,
    CostModel,
    CostWeights,
    Match,
    MeasuredSpeeds,
    PromptView,
    ReplicaView,
    Speeds,
    make_policy,
)

MILLISECOND_PER_TOKEN = Speeds(
    prefill_base_s=0.0,
    prefill_token_s=1e-3,
    prefill_pair_s=0.0,
    host_token_s=1e-5,
    store_token_s=1e-4,
    decode_slowdown=0.0,
    work_s=0.025,
)


def cost_model(**weights) -> CostModel:
    return CostModel(MeasuredSpeeds(MILLISECOND_PER_TOKEN), CostWeights(**weights))


def choose(name, prompt, *views, seed=0, mean_pending=0.0, now_s=0.0):
    policy = make_policy(name, cost_model(), random.Random(seed))
    return policy.choose(prompt, ClusterView(views, mean_pending, now_s)).replica_id


def view(name: str, work_s: float = 0.0, pending: int = 0) -> ReplicaView:
    return ReplicaView(name, pending_work_s=work_s, head_work_s=work_s, num_pending=pending)


def prompt(num_tokens=1000, shared=0, **device_tokens) -> PromptView:
    matches = {name: Match(depth, depth) for name, depth in device_tokens.items()}
    return PromptView(num_tokens, shared, matches)


@pytest.mark.parametrize(
    ("views", "known", "shared", "expected"),
    [
        pytest.param([("a", 0, 0), ("b", 0, 0)], {"b": 512}, 0, "b", id="longest prefix"),
        pytest.param([("a", 0, 0), ("b", 0.6, 1)], {"b": 512}, 0, "a", id="too busy"),
        pytest.param([("a", 0, 0), ("b", 0.4, 1)], {"b": 512}, 0, "b", id="busy, but worth it"),
        pytest.param([("a", 0, 0), ("b", 0.4, 1)], {"b": 512}, 512, "a", id="a fetch is cheap"),
        pytest.param([("a", 0, 0), ("b", 0, 0)], {"b": 512}, 512, "b", id="a fetch is not free"),
        pytest.param([("a", 0, 3), ("b", 0, 0)], {"a": 20}, 0, "b", id="doubt about the busy"),
    ],
)
def test_the_least_predicted_cost_wins(views, known, shared, expected):
    candidates = [view(*one) for one in views]
    assert choose("least_cost", prompt(1000, shared, **known), *candidates) == expected


def test_equal_replicas_are_chosen_at_random_and_reproducibly():
    views = [view("a"), view("b")]
    picks = [choose("least_cost", prompt(10), *views, seed=seed) for seed in range(40)]
    assert set(picks) == {"a", "b"}
    assert picks == [choose("least_cost", prompt(10), *views, seed=seed) for seed in range(40)]


def test_round_robin_takes_turns_and_survives_a_change_of_members():
    policy = make_policy("round_robin", cost_model(), random.Random(0))
    abc = [view(name) for name in "cab"]
    assert [policy.choose(prompt(1), ClusterView(abc)).replica_id for _ in range(4)] == list("abca")
    assert policy.choose(prompt(1), ClusterView(abc[:1])).replica_id == "c"
    assert policy.choose(prompt(1), ClusterView(abc)).replica_id == "a"


def test_least_outstanding_ignores_prefixes():
    views = [view("a", 0, 2), view("b", 5.0, 1)]
    assert choose("least_outstanding", prompt(1000, a=900), *views) == "b"


def test_random_is_even():
    policy = make_policy("random", cost_model(), random.Random(1))
    views = [view("a"), view("b", 9.9, 9)]
    counts = Counter(policy.choose(prompt(1), ClusterView(views)).replica_id for _ in range(400))
    assert min(counts.values()) > 150


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_chooses_a_candidate(name):
    assert choose(name, prompt(1), view("only")) == "only"
