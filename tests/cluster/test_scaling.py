"""Scaling: loads in, decisions out; and a real cluster that grows under load and shrinks again."""

import asyncio
import time
from contextlib import aclosing
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import GetTimeoutError

from actors.config import ModelSource
from actors.engine import GenerationRequest, Receipt, SamplingParams
from actors.hottest import hottest
from actors.questions import AskedReplica
from actors.replica_health import ReplicaHealth, ReplicaStats
from actors.request_log import RequestTrace
from cluster.config import ClusterConfig
from cluster.driver import Cluster
from cluster.scaler import ScalerThread, rules_of
from cluster.scaling import Awaited, ReplicaLoad, Scaler, ScalingRules
from shared_cache.hashing import BlockHash, ReuseScope, block_hashes
from tests.fakes import FAKE_TEXT, build_fake_engine
from tests.tiny_model import make_tiny_model, tiny_source
from tests.tiny_replicas import BLOCK, tiny_replica

RULES = ScalingRules(1, 3, high=1.0, low=0.5, up_after_s=10, down_after_s=60, pause_s=20)


def loads(*numbers: int) -> list[ReplicaLoad]:
    """Replicas that take ten requests at a time and have so many."""
    return [ReplicaLoad(f"r-{index}", number, 10) for index, number in enumerate(numbers)]


def verbs(scaler: Scaler, numbers, times) -> list[str]:
    return [scaler.decide(loads(*numbers), 0, now_s).verb for now_s in times]


def test_one_is_added_when_load_stayed_high():
    scaler = Scaler(RULES, 0)
    assert verbs(scaler, [11], [0, 5, 9.9]) == ["keep"] * 3
    assert verbs(scaler, [11], [10]) == ["add"]


def test_a_gust_adds_none():
    scaler = Scaler(RULES, 0)
    assert verbs(scaler, [50], [0, 9]) == ["keep"] * 2
    assert verbs(scaler, [9], [9.5]) == ["keep"]
    assert verbs(scaler, [50], [10, 19]) == ["keep"] * 2


def test_full_but_nobody_waiting_adds_none():
    assert verbs(Scaler(RULES, 0), [10], range(100)) == ["keep"] * 100


def test_a_change_is_followed_by_a_pause_and_a_new_wait():
    scaler = Scaler(RULES, 0)
    assert verbs(scaler, [40], [0, 10]) == ["keep", "add"]
    assert verbs(scaler, [20, 20], range(11, 30)) == ["keep"] * 19
    assert verbs(scaler, [20, 20], [30]) == ["add"]


def test_the_idlest_goes_when_the_others_can_do_its_work():
    scaler = Scaler(RULES, 0)
    for now_s in (0, 59):
        assert scaler.decide(loads(3, 1, 2), 0, now_s).verb == "keep"
    decision = scaler.decide(loads(3, 1, 2), 0, 60)
    assert (decision.verb, decision.replica) == ("remove", "r-1")
    newest = Scaler(RULES, 0)
    newest.decide(loads(0, 0, 0), 0, 0)
    assert newest.decide(loads(0, 0, 0), 0, 60).replica == "r-2"


def test_none_goes_when_one_less_would_not_be_enough():
    assert verbs(Scaler(RULES, 0), [4, 4], range(0, 1000, 10)) == ["keep"] * 100


def test_limits_hold():
    assert verbs(Scaler(RULES, 0), [90, 90, 90], range(100)) == ["keep"] * 100
    assert verbs(Scaler(RULES, 0), [0], range(0, 1000, 10)) == ["keep"] * 100


def test_a_lost_replica_is_replaced_at_once():
    rules = ScalingRules(2, 3)
    assert Scaler(rules, 0).decide(loads(0), 0, 0).verb == "add"
    assert Scaler(rules, 0).decide(loads(0), 1, 0).verb == "keep", "it is starting already"
    failing = Scaler(rules, 0)
    assert failing.decide([], 0, 0).verb == "add"
    failing.failed(100)
    assert failing.decide([], 0, 120).verb == "keep"
    assert failing.decide([], 0, 130).verb == "add"


def test_one_that_does_not_serve_is_waited_for_no_longer_than_a_start_takes():
    awaited = Awaited(60)
    assert awaited.count({"a": "ready", "b": "starting", "c": None}, 0) == 2
    assert awaited.count({"a": "ready", "b": "ready", "c": None}, 59.9) == 1
    assert awaited.count({"a": None, "b": "starting", "c": None}, 60) == 2, "c took too long"
    assert awaited.count({"a": None, "b": "failed"}, 61) == 1, "b was built and failed"
    assert awaited.count({"a": None, "b": "starting"}, 62) == 1, "until it is ready"
    assert awaited.count({"a": "ready", "b": "ready"}, 63) == 0
    assert awaited.count({"a": "ready", "b": "starting"}, 64) == 1


def test_broken_replicas_are_no_capacity_and_take_up_places():
    def changes(num_broken: int, *numbers: int):
        scaler = Scaler(ScalingRules(1, 3, up_after_s=10), 0)
        return [scaler.decide(loads(*numbers), 0, now_s, num_broken).verb for now_s in (0, 10)]

    assert changes(1, 50) == ["keep", "add"]
    assert changes(2, 50) == ["keep", "keep"], "there are three"
    assert changes(1) == ["add", "keep"], "none serves"
    assert changes(3) == ["keep", "keep"]


@pytest.mark.parametrize("state", [None, "failed", "stalled", "starting"])
def test_one_is_added_at_high_load_although_another_is_broken(monkeypatch, state):
    settings = {
        "engine": {"max_batch_size": 8},
        "scaling": {"up_after_s": 0, "pause_s": 0},
        "lifecycle": {"startup_timeout_s": 0.1},
    }
    thread, added = scaler_of(Replicas(r="ready", s=state), **settings), []
    monkeypatch.setattr(thread, "add", lambda: added.append(1))
    thread.tick()
    time.sleep(0.15)
    thread.tick()
    assert added


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 60)), max_size=80))
def test_whatever_the_load_the_number_stays_within_limits_and_changes_are_apart(steps):
    scaler, num, now_s, changes = Scaler(RULES, 0), 1, 0.0, []
    for wait_s, work in steps:
        now_s += wait_s
        decision = scaler.decide(loads(*[work // num] * num), 0, now_s)
        num += {"add": 1, "remove": -1, "keep": 0}[decision.verb]
        assert RULES.min_replicas <= num <= RULES.max_replicas
        changes += [now_s] * (decision.verb != "keep")
    assert all(later - earlier >= RULES.pause_s for earlier, later in pairwise(changes))


def test_wrong_rules_and_settings_are_refused():
    with pytest.raises(ValueError, match="must be below"):
        ScalingRules(1, 2, high=0.5, low=0.5)
    with pytest.raises(ValueError, match="replicas would come and go"):
        ClusterConfig(model="x", scaling={"low_load": 1, "high_load": 1})
    with pytest.raises(ValueError, match=r"replicas.min \(3\) is more"):
        ClusterConfig(model="x", replicas={"min": 3, "max": 2})
    config = ClusterConfig(model="x", replicas={"min": 1, "max": 4})
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert config.replica_names == ("kvcommons-replica-0",)
    assert rules_of(config).max_replicas == 4
    assert ClusterConfig(model="x", replicas=3).max_replicas == 3


class Replicas:
    """Stands for `ReplicaActors`: what `states` says of each, and what was done."""

    def __init__(self, **states: str | None) -> None:
        self.states = states
        self.routed = self.handles = dict.fromkeys(states)
        self.done: list[str] = []

    def stats(self, names):
        return {name: self._stats(name) for name in names}

    def drain(self, names, timeout_s):
        self.done.append("drain")

    def route_no_more_to(self, name):
        self.done.append("route no more")

    def end(self, names):
        self.done += [f"end {name}" for name in names]

    def _stats(self, name):
        state = self.states[name]
        if state is None:
            return None
        num_outstanding = 12 if state == "ready" else 0
        health = ReplicaHealth(name, "boot", 1, state)
        return ReplicaStats(health, 1.0, num_outstanding, None, None)


def scaler_of(replicas, forget=lambda name: None, **settings) -> ScalerThread:
    config = ClusterConfig(model="x", name="a", replicas={"min": 1, "max": 3}, **settings)
    return ScalerThread(config, replicas, 1, forget)


@pytest.mark.parametrize("error", [GetTimeoutError("it restarts"), ValueError("odd")])
def test_a_replica_that_was_drained_ends_also_while_the_router_is_away(error):
    def forget(name):
        raise error

    replicas = Replicas(r="ready")
    scaler_of(replicas, forget).remove("r")
    assert replicas.done == ["drain", "route no more", "end r"]


def trace(number: int, *blocks: int) -> RequestTrace:
    hashes = tuple(BlockHash(bytes([block]) * 32) for block in blocks)
    receipt = Receipt(9, 0, 0, 0, 9)
    return RequestTrace(str(number), "r", "ns", number, 8, hashes, receipt, 0, 0, None)


def names(prefixes) -> list[list[int]]:
    return [[block[0] for block in one.hashes] for one in prefixes]


def test_what_requests_had_in_common_comes_first_then_the_latest():
    traces = [trace(1, 1, 2, 3), trace(2, 1, 2, 4), trace(3, 9), trace(4, 8)]
    assert names(hottest(traces, 100)) == [[1, 2], [8], [9], [1, 2, 4], [1, 2, 3]]
    assert names(hottest(traces, 3)) == [[1, 2], [8]]
    assert names(hottest(traces, 1)) == [[1]]
    assert hottest([], 5) == hottest(traces, 0) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_source(make_tiny_model(tmp_path_factory.mktemp("scaling")))


async def ask(one: AskedReplica, prompt, name: str) -> Receipt:
    request = GenerationRequest(
        name, prompt, SamplingParams(2, ignore_eos=True), ReuseScope("somebody")
    )
    return (await one.answer(request)).receipt


async def test_a_new_replica_has_the_hottest_prefixes_before_its_first_request(model, tmp_path):
    prompt = tuple(range(3, 3 + 3 * BLOCK + 1))
    async with (
        tiny_replica("old", model, tmp_path) as old,
        tiny_replica("new", model, tmp_path) as new,
    ):
        await ask(old, prompt, "a")
        await ask(old, prompt, "b")
        assert await old.flush(20)
        room = await new.num_warm_blocks()
        assert room == new.replica._built().cache.num_blocks // 2
        prefixes = hottest(await old.recent(room), room)
        assert await new.warm(prefixes, 20.0) == 3
        receipt = await ask(new, prompt, "c")
        assert (receipt.host, receipt.shared) == (3 * BLOCK, 0), "it need not wait for the store"


async def test_a_replica_that_drains_saves_what_nobody_stored(model, tmp_path):
    prompt = tuple(range(3, 3 + 3 * BLOCK + 1))
    async with tiny_replica("old", model, tmp_path) as old:
        await ask(old, prompt, "a")
        assert await old.flush(20)
        cache = old.replica._built().cache
        hashes = block_hashes(prompt, BLOCK, ReuseScope("somebody"))
        cache.shared_store.forget(hashes)
        cache.host.stored(hashes, is_stored=False)
        assert await old.replica.drain(20)
        assert cache.shared_store.match(hashes) == 3


PATIENCE_S = 150.0

FAKE = ModelSource(name="fake", path="", revision="0")


async def collect(dispatcher, name: str) -> str:
    request = GenerationRequest(name, tuple(range(300, 312)), SamplingParams(150))
    async with aclosing(dispatcher.generate(request)) as stream:
        return "".join([routed.chunk.text async for routed in stream])


@pytest.mark.ray
@pytest.mark.timeout(300)
async def test_a_cluster_grows_under_load_and_shrinks_again_without_losing_a_request(ray_session):
    config = ClusterConfig(
        name="elastic",
        model="fake",
        replicas={"min": 1, "max": 2},
        num_cpus_per_replica=0.5,
        engine={
            "torch_threads": 1,
            "max_batch_size": 2,
            "kv_cache_config": {"tokens_per_block": 4},
        },
        scaling={"up_after_s": 0, "down_after_s": 0, "pause_s": 0, "low_load": 0.6},
    )
    said = FAKE_TEXT.encode()[:150].decode(errors="ignore")
    with Cluster.start(config, FAKE, build_fake_engine) as cluster:
        dispatcher = cluster.dispatcher()
        running: set[asyncio.Task] = set()
        deadline_s = time.monotonic() + PATIENCE_S
        sizes = set()
        for number in range(10_000):
            sizes.add(sum(one.alive for one in cluster.router().replicas))
            if sizes >= {1, 2}:
                break
            while len([task for task in running if not task.done()]) < 8:
                running.add(asyncio.create_task(collect(dispatcher, f"{number}.{len(running)}")))
            assert time.monotonic() < deadline_s, sizes
            await asyncio.sleep(0.05)
        answers = await asyncio.gather(*running)
        assert {answer.startswith(said[:80]) for answer in answers} == {True}
        while len(cluster.stats()) > 1:
            assert time.monotonic() < deadline_s, cluster.router()
            assert (await collect(dispatcher, f"late{time.monotonic()}")).startswith(said[:80])
        (kept,) = cluster.stats()  # the idlest one goes, whichever that was
        assert [one.replica_id for one in cluster.router().replicas] == [kept]
        assert (await collect(dispatcher, "last")).startswith(said[:80])
