"""A cluster on a real Ray, with a fake engine: start, stream, kill, restart, stop."""

import asyncio
import os
import signal
import time
from contextlib import aclosing

import pytest
import ray
from ray.exceptions import RayError

from actors.config import ModelSource
from actors.engine import GenerationRequest, SamplingParams
from cluster.clients import RAY_NAMESPACE, connect
from cluster.config import ClusterConfig
from cluster.driver import Cluster
from shared_cache.errors import ConfigError, ModelError, ReplicaUnavailableError, RequestError
from shared_cache.hashing import block_hashes
from tests.fakes import (
    DEADLY_TOKEN,
    FAKE_TEXT,
    NUM_TOLD_BLOCKS,
    FakeEngine,
    build_fake_engine,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("ray_session"),
]

MODEL = ModelSource(name="fake", path="", revision="0")
PATIENCE_S = 60.0


ENGINE = {"torch_threads": 1, "kv_cache_config": {"tokens_per_block": 4}}


def config(**settings) -> ClusterConfig:
    waits = {"first_wait_s": PATIENCE_S}  # a router that was killed may take long to come back
    defaults = {"model": "fake", "engine": ENGINE, "num_cpus_per_replica": 0.5, "dispatch": waits}
    return ClusterConfig(**(defaults | settings))


def request(max_tokens: int = 20, name: str = "r") -> GenerationRequest:
    return GenerationRequest(name, tuple(range(300, 312)), SamplingParams(max_tokens))


def named_actors() -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {one["name"] for one in actors if one["namespace"] == RAY_NAMESPACE}


async def collect(dispatcher, wanted):
    async with aclosing(dispatcher.generate(wanted)) as stream:
        return [routed async for routed in stream]


def said(routed) -> str:
    return "".join(one.chunk.text for one in routed)


@pytest.fixture(scope="module")
def cluster(ray_session):
    with Cluster.start(config(name="fake"), MODEL, build_fake_engine) as cluster:
        yield cluster
    assert not {one for one in named_actors() if one.startswith("fake")}


async def eventually(condition):
    """Wait until `condition()` is true; its last value."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "did not come true in time"
        await asyncio.sleep(0.05)
    return value


def alive(cluster) -> dict[str, str]:
    try:
        replicas = cluster.router().replicas
    except RayError:  # a router that is being restarted knows nobody
        return {}
    return {one.replica_id: one.boot_id for one in replicas if one.alive}


async def test_streams_and_spreads_load(cluster):
    dispatcher = cluster.dispatcher()
    num_bytes = len(FAKE_TEXT[:12].encode())
    streams = [collect(dispatcher, request(num_bytes, str(i))) for i in range(4)]
    results = await asyncio.gather(*streams)
    assert {said(routed) for routed in results} == {FAKE_TEXT[:12]}
    assert {routed[0].replica_id for routed in results} == set(cluster.config.replica_names)
    assert all(routed[-1].num_failovers == 0 for routed in results)


def test_actors_have_readable_names_and_the_router_knows_the_replicas(cluster):
    names = {"fake-router", "fake-replica-0", "fake-replica-1"}
    assert names <= named_actors()
    assert set(alive(cluster)) == names - {"fake-router"}
    stats = cluster.stats()
    assert {one.health.name for one in stats.values()} == set(stats) == set(alive(cluster))
    assert len({one.health.pid for one in stats.values()}) == 2
    assert cluster.max_total_tokens == 4096
    assert cluster.flush(5)


async def test_request_errors_cross_processes_as_themselves(cluster):
    with pytest.raises(RequestError, match="do not fit"):
        await collect(cluster.dispatcher(), request(100_000))


async def test_closing_a_stream_aborts_on_the_replica(cluster):
    stream = cluster.dispatcher().generate(request(400))
    routed = await anext(stream)
    assert cluster.stats()[routed.replica_id].num_outstanding == 1
    await stream.aclose()
    await eventually(lambda: cluster.stats()[routed.replica_id].num_outstanding == 0)
    await eventually(lambda: cluster.router().num_reservations == 0)


def busy_replica(cluster, at_least):
    """A replica with that many open requests, which it is left to the router to choose; or None."""
    busiest = max(cluster.stats().values(), key=lambda stats: stats.num_outstanding)
    return busiest if busiest.num_outstanding >= at_least else None


async def test_kill_9_loses_no_request_and_the_replica_comes_back(cluster):
    dispatcher = cluster.dispatcher()
    before = alive(cluster)
    expected = FAKE_TEXT.encode()[:200].decode(errors="ignore")
    tasks = [asyncio.create_task(collect(dispatcher, request(200, str(i)))) for i in range(6)]
    busiest = await eventually(lambda: busy_replica(cluster, at_least=3))
    victim = busiest.health.name
    os.kill(busiest.health.pid, signal.SIGKILL)
    results = await asyncio.gather(*tasks)
    assert {said(routed) for routed in results} == {expected}
    moved = [routed for routed in results if routed[-1].num_failovers]
    assert len(moved) >= 2
    # One that waited for its first token came from the other one only.
    assert any(routed[0].replica_id == victim for routed in moved)
    assert all(routed[-1].replica_id != victim for routed in moved)
    after = await eventually(lambda: alive(cluster) if len(alive(cluster)) == 2 else None)
    assert after[victim] != before[victim]


async def test_an_engine_that_ends_in_a_living_process_is_restarted(cluster):
    dispatcher, before = cluster.dispatcher(), alive(cluster)
    deadly = GenerationRequest("r", (DEADLY_TOKEN, 1, 2), SamplingParams(9))
    answers = await asyncio.gather(*(collect(dispatcher, deadly) for _ in range(4)))
    assert {said(routed) for routed in answers} == {FAKE_TEXT.encode()[:9].decode(errors="ignore")}
    victim, other = cluster.config.replica_names
    assert {routed[0].replica_id for routed in answers} == {other}
    assert any(routed[0].num_failovers for routed in answers)
    after = await eventually(lambda: alive(cluster) if len(alive(cluster)) == 2 else None)
    assert (after[victim] != before[victim], after[other] == before[other]) == (True, True)


async def test_a_restarted_router_is_told_of_replicas_streams_and_caches(cluster):
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(request(400))
    await anext(stream)
    ray.kill(ray.get_actor("fake-router", namespace=RAY_NAMESPACE), no_restart=False)
    beginning = FAKE_TEXT.encode()[:5].decode(errors="ignore")
    assert said(await collect(dispatcher, request(5))) == beginning
    assert said(await collect(cluster.dispatcher(), request(5))) == beginning
    await eventually(lambda: len(alive(cluster)) == 2)
    await eventually(lambda: cluster.router().num_reservations == 1)  # the stream that goes on
    await eventually(lambda: min(known_blocks(cluster)) >= NUM_TOLD_BLOCKS)
    await stream.aclose()
    await eventually(lambda: cluster.router().num_reservations == 0)


def known_blocks(cluster) -> set[int]:
    return {one.known_blocks for one in cluster.router().replicas}


async def test_the_router_knows_what_engines_tell_of_their_devices(cluster):
    await eventually(lambda: min(known_blocks(cluster)) >= NUM_TOLD_BLOCKS)
    route = await cluster.dispatcher()._router.route(block_hashes(range(40), 4), 41)
    assert route.known_tokens == 40


async def test_connects_by_name_from_elsewhere(cluster):
    assert said(await collect(connect(cluster.config), request(3))) == "Gr"
    nobody = config(name="nobody", dispatch={"first_wait_s": 0})
    with pytest.raises(ReplicaUnavailableError):
        await collect(connect(nobody), request(3))


async def test_control_calls_are_answered_while_streams_fill_the_replica(ray_session, monkeypatch):
    monkeypatch.setattr("cluster.replica_actors.SPARE_STREAMS", 0)
    engine = {"max_batch_size": 1, "max_waiting_requests": 1}
    settings = config(name="busy", replicas=1, engine=ENGINE | engine)
    with Cluster.start(settings, MODEL, build_slow_engine) as cluster:
        dispatcher = cluster.dispatcher()
        tasks = [asyncio.create_task(collect(dispatcher, request(100, str(i)))) for i in range(2)]
        replica = ray.get_actor("busy-replica-0", namespace=RAY_NAMESPACE)
        await eventually(lambda: ray.get(replica.stats.remote(), timeout=5).num_outstanding == 2)
        assert ray.get(replica.health.remote(), timeout=5).state == "ready"
        assert ray.get(replica.flush.remote(1), timeout=5)
        assert not any(task.done() for task in tasks)
        assert ray.get(replica.drain.remote(0.1), timeout=5) is False
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert ray.get(replica.drain.remote(5), timeout=10), "the end of a stream wakes who drains"


async def test_what_a_full_replica_refuses_waits_and_is_served(ray_session):
    engine = {"max_batch_size": 1, "max_waiting_requests": 1}
    settings = config(name="full", replicas=1, engine=ENGINE | engine)
    with Cluster.start(settings, MODEL, build_fake_engine) as cluster:
        before = alive(cluster)
        dispatcher = cluster.dispatcher()
        answers = await asyncio.gather(
            *(collect(dispatcher, request(20, str(i))) for i in range(6))
        )
        expected = FAKE_TEXT.encode()[:20].decode(errors="ignore")
        assert {said(routed) for routed in answers} == {expected}
        assert {one.num_failovers for routed in answers for one in routed} == {0}
        assert alive(cluster) == before


def build_slow_engine(config):
    return FakeEngine(turn_s=1.0)


def test_a_second_cluster_of_the_same_name_is_refused(cluster):
    with pytest.raises(ConfigError, match="set another `name`"):
        Cluster.start(cluster.config, MODEL, build_fake_engine)
    assert len(alive(cluster)) == 2


def test_too_many_replicas_are_refused_at_once(ray_session):
    with pytest.raises(ConfigError, match="need 50 CPUs"):
        Cluster.start(config(name="big", replicas=100), MODEL, build_fake_engine)


def test_cpus_that_others_hold_are_not_waited_for_for_ever(ray_session, monkeypatch):
    monkeypatch.setattr("cluster.ray_resources.FREE_RESOURCES_TIMEOUT_S", 0.2)
    holder = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(holder.here.remote())
    with pytest.raises(ConfigError, match="stop what uses the others"):
        Cluster.start(config(name="late", replicas=8), MODEL, build_fake_engine)
    ray.kill(holder)


class Holder:
    def here(self):
        return True


def refuse_to_build(config):
    raise ModelError("the weights are not there; copy them")


def test_a_replica_that_cannot_start_says_why_and_leaves_nothing(ray_session):
    with pytest.raises(ModelError, match="copy them"):
        Cluster.start(config(name="bad"), MODEL, refuse_to_build)
    assert not {one for one in named_actors() if one.startswith("bad")}
