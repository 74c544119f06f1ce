"""What a replica costs: predictions in seconds, from figures that are easy to add up."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.routing import (
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

SIMPLE = Speeds(
    prefill_base_s=0.0,
    prefill_token_s=1e-3,
    prefill_pair_s=0.0,
    host_token_s=1e-5,
    store_token_s=1e-4,
    decode_slowdown=1e-6,
    stream_s=10.0,
    output_tokens=0.0,
    work_s=1.0,
)


def model(**weights) -> CostModel:
    weights = {"doubt": 0.0, "price": 0.0, "memory": 0.0} | weights
    return CostModel(MeasuredSpeeds(SIMPLE), CostWeights(**weights))


def cost(prompt, replica, mean_pending=0.0, now_s=0.0, **weights) -> float:
    return model(**weights).cost(prompt, replica, ClusterView([replica], mean_pending, now_s))


def test_each_source_has_its_price():
    a = ReplicaView("a")
    assert cost(PromptView(1000), a) == pytest.approx(1.0)
    assert cost(PromptView(1000, matches={"a": Match(600, 600)}), a) == pytest.approx(0.4)
    assert cost(PromptView(1000, matches={"a": Match(0, 600)}), a) == pytest.approx(0.406)
    assert cost(PromptView(1000, shared_tokens=600), a) == pytest.approx(0.46)
    everything = PromptView(1000, 800, {"a": Match(100, 600)})
    assert cost(everything, a) == pytest.approx(0.2 + 500 * 1e-5 + 200 * 1e-4)


def test_at_least_one_token_is_computed():
    plan = model().plan(PromptView(1000, 1000, {"a": Match(1000, 1000)}), ReplicaView("a"), 0.0)
    assert (plan.computed_tokens, plan.device_tokens, plan.cached_tokens) == (1, 999, 999)


def test_a_busy_link_makes_computing_the_better_source():
    idle, busy = ReplicaView("a"), ReplicaView("a", store_link_free_s=5.0, links_free_s=5.0)
    prompt = PromptView(1000, shared_tokens=600)
    assert model().plan(prompt, idle, 0.0).shared_tokens == 600
    assert model().plan(prompt, busy, 0.0).shared_tokens == 0
    assert model().plan(prompt, busy, 4.9).shared_tokens == 600


def test_the_head_of_the_queue_has_run_for_a_while_but_never_longer_than_it_takes():
    one = ReplicaView("a", num_pending=2, pending_work_s=5.0, head_work_s=2.0, busy_since_s=10.0)
    waits = [model().wait_s(one, now_s) for now_s in (9.0, 10.0, 11.5, 99.0)]
    assert waits == pytest.approx([5.0, 5.0, 3.5, 3.0])


def test_decodes_slow_prefill_down():
    decoding = ReplicaView("a", running_kv_tokens=500_000)
    assert cost(PromptView(1000), decoding) == pytest.approx(1.5)


def test_doubt_grows_with_what_is_pending_and_price_with_the_square_of_the_mean():
    one = ReplicaView("a", num_pending=3)
    assert cost(PromptView(1000), one, doubt=0.4) == pytest.approx(1.0 + 3 * 0.4)
    assert cost(PromptView(1000), one, mean_pending=0.5, price=8.0) == pytest.approx(1.0 + 2.0)


def test_the_price_of_a_prefill_prefers_the_cache_when_the_cluster_is_busy():
    far, near = ReplicaView("far"), ReplicaView("near", num_pending=1, pending_work_s=1.0)
    prompt = PromptView(1000, matches={"near": Match(700, 700)})
    policy = make_policy("least_cost", model(price=8.0), random.Random(0))
    assert policy.choose(prompt, ClusterView([far, near], 0.1)).replica_id == "far"
    assert policy.choose(prompt, ClusterView([far, near], 1.0)).replica_id == "near"


def test_full_kv_memory_is_a_wait_for_the_streams_to_end():
    full = ReplicaView("a", 100_000, num_running=9, kv_tokens=99_500, running_kv_tokens=99_500)
    wait_s = 500 * SIMPLE.stream_s / 99_500
    assert model().memory_wait_s(PromptView(1000), full) == pytest.approx(wait_s)
    assert cost(PromptView(10_000), full) == pytest.approx(10 * (1 + 0.0995))
    assert model().memory_wait_s(PromptView(1000), ReplicaView("a")) == 0.0, "size not known"


def test_what_a_demoted_replica_holds_is_not_believed():
    demoted = ReplicaView("a", is_load_only=True)
    assert cost(PromptView(1000, matches={"a": Match(900, 900)}), demoted) == pytest.approx(1.0)


def test_affinity_keeps_a_session_where_it_was_within_its_allowance():
    policy = make_policy("least_cost", model(affinity=0.5), random.Random(0))
    prompt = PromptView(1000, session="s")
    first = policy.choose(prompt, ClusterView([ReplicaView("a"), ReplicaView("b")])).replica_id
    for waits_s, stays in ((0.4, True), (0.6, False)):
        home = ReplicaView(first, num_pending=1, pending_work_s=waits_s, floor_s=waits_s)
        other = ReplicaView("b" if first == "a" else "a")
        chosen = policy.choose(prompt, ClusterView([home, other]))
        assert (chosen is home) == stays
    gone = ClusterView([ReplicaView("c")])
    assert policy.choose(prompt, gone).replica_id == "c"


TOKENS = st.integers(0, 4000)
VIEWS = st.builds(
    lambda pending, head, rest, running, kv, busy, links: ReplicaView(
        "?",
        kv_capacity_tokens=50_000,
        num_pending=pending,
        pending_work_s=(head + rest) * (pending > 0),
        head_work_s=head * (pending > 0),
        floor_s=rest * (pending > 0),
        busy_since_s=busy,
        running_kv_tokens=running,
        kv_tokens=running + kv,
        store_link_free_s=links,
        links_free_s=links,
    ),
    st.integers(0, 3),
    st.floats(0, 3),
    st.floats(0, 3),
    st.sampled_from([0, 1000, 30_000]),
    st.sampled_from([0, 20_000]),
    st.sampled_from([0.0, 9.0, 11.0]),
    st.sampled_from([0.0, 10.3]),
)


@settings(max_examples=60)
@given(
    views=st.lists(VIEWS, min_size=1, max_size=8),
    depths=st.lists(st.tuples(TOKENS, TOKENS), min_size=8, max_size=8),
    shared=TOKENS,
    num_tokens=st.integers(1, 5000),
    mean_pending=st.floats(0, 2),
)
def test_passing_replicas_over_changes_no_choice(views, depths, shared, num_tokens, mean_pending):
    for number, view in enumerate(views):
        view.replica_id = f"r{number}"
    matches = {f"r{n}": Match(a, max(a, b)) for n, (a, b) in enumerate(depths) if a or b}
    prompt = PromptView(num_tokens, shared, matches)
    cluster = ClusterView(views, mean_pending, 10.0)
    costs = model(doubt=0.4, price=8.0, memory=0.3)
    chosen = make_policy("least_cost", costs, random.Random(0)).choose(prompt, cluster)
    least = min(costs.cost(prompt, one, cluster) for one in views)
    assert costs.cost(prompt, chosen, cluster) == pytest.approx(least)
