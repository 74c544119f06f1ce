"""The rules of other routers: views in, the choice that their sources make out."""

import random
from collections import Counter

import pytest

from actors.routing import (
    ClusterView,
    CostModel,
    Match,
    MeasuredSpeeds,
    PromptView,
    ReplicaView,
    make_policy,
)

ABC = ("a", "b", "c")


def rule(name: str, seed: int = 0):
    return make_policy(name, CostModel(MeasuredSpeeds()), random.Random(seed))


def pick(name: str, prompt: PromptView, *views: ReplicaView) -> str:
    return rule(name).choose(prompt, ClusterView(views)).replica_id


def view(name: str, pending: int = 0, running: int = 0, **state) -> ReplicaView:
    return ReplicaView(name, 400_000, num_pending=pending, num_running=running, **state)


def prompt(num_tokens: int = 10_000, shared: int = 0, session=None, **device: int) -> PromptView:
    matches = {name: Match(depth, depth) for name, depth in device.items()}
    return PromptView(num_tokens, shared, matches, session=session)


def test_power_of_two_never_takes_the_longest_of_three_queues():
    two = rule("power_of_two", seed=1)
    cluster = ClusterView([view("a"), view("b", 1), view("c", 5)])
    picks = Counter(two.choose(prompt(), cluster).replica_id for _ in range(200))
    assert set(picks) == {"a", "b"}
    assert picks["a"] > picks["b"]


def test_session_hash_stays_until_its_replica_has_too_much():
    calm = [view(name, running=2) for name in ABC]
    homes = {str(n): pick("session_hash", prompt(session=str(n)), *calm) for n in range(30)}
    assert set(homes.values()) == set(ABC)
    home = homes["7"]
    assert all(pick("session_hash", prompt(session="7"), *calm) == home for _ in range(5))
    busy = [view(name, running=9 if name == home else 2) for name in ABC]
    assert pick("session_hash", prompt(session="7"), *busy) != home
    fewer = [one for one in calm if one.replica_id != home]
    moved = [n for n in homes if pick("session_hash", prompt(session=n), *fewer) != homes[n]]
    assert set(moved) == {n for n, where in homes.items() if where == home}


@pytest.mark.parametrize(
    ("views", "device", "expected"),
    [
        pytest.param([("a", 9), ("b", 0)], {"a": 5000}, "a", id="load is no reason"),
        pytest.param([("a", 9), ("b", 0)], {"a": 500}, "b", id="below a tenth it spreads"),
        pytest.param([("a", 3), ("b", 1)], {"a": 5000, "b": 5000}, "b", id="load breaks ties"),
    ],
)
def test_prefix_first(views, device, expected):
    first = rule("prefix_first")
    if expected == "b" and not device.get("b"):
        first.choose(prompt(), ClusterView([view("a")]))  # it was sent something
    chosen = first.choose(prompt(**device), ClusterView([view(*one) for one in views]))
    assert chosen.replica_id == expected


@pytest.mark.parametrize(
    ("views", "device", "expected"),
    [
        pytest.param([("a", 9), ("b", 0)], {"a": 5000}, "a", id="match while balanced"),
        pytest.param([("a", 9), ("b", 0)], {"a": 2000}, "b", id="match too short"),
        pytest.param([("a", 70), ("b", 0)], {"a": 5000}, "b", id="imbalanced"),
    ],
)
def test_sglang(views, device, expected):
    assert pick("sglang", prompt(**device), *(view(*one) for one in views)) == expected


def test_lmetric_multiplies_tokens_and_requests():
    views = [view("a", 3), view("b", 1)]
    assert pick("sglang_lmetric", prompt(a=4000), *views) == "b"
    assert pick("sglang_lmetric", prompt(a=5100), *views) == "a"


def test_dynamo_adds_tokens_to_prefill_and_tokens_that_are_decoded():
    busy, idle = view("a", pending_tokens=4000), view("b")
    assert pick("dynamo", prompt(a=5000), busy, idle) == "a"
    assert pick("dynamo", prompt(a=3000), busy, idle) == "b"
    decoding = view("a", running=1, kv_tokens=6000)
    assert pick("dynamo", prompt(a=5000), decoding, idle) == "b"


def test_llm_d_weighs_match_memory_and_queue():
    views = [view("a", 2, running_kv_tokens=200_000), view("b", 0)]
    assert pick("llm_d", prompt(a=8000), *views) == "a"
    assert pick("llm_d", prompt(a=7000), *views) == "b"
    assert pick("llm_d_chart", prompt(a=9000), *views) == "b"


def test_conductor_takes_the_sum_of_queue_and_prefill():
    views = [view("a", 1, pending_work_s=0.2, head_work_s=0.2), view("b")]
    assert pick("conductor", prompt(a=9000), *views) == "a"
    assert pick("conductor", prompt(a=4000), *views) == "b"
    assert pick("conductor", prompt(a=9000, shared=9000), *views) == "b", "a transfer is cheaper"
