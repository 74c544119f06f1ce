"""Dispatch with replicas that die: the stream has no gap and no repeat, in tokens and in text."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest

from actors.dispatch import DispatchConfig, Dispatcher
from actors.engine import GenerationRequest, SamplingParams, TokenChunk
from actors.router import Router, RouterConfig
from actors.router_messages import Finished, FirstToken, ReplicaInfo, RouteRequest
from actors.routing.index import routing_keys
from actors.wire.client import WireReplica
from actors.wire.server import Address
from shared_cache.errors import (
    ReplicaBusyError,
    ReplicaRefusedError,
    ReplicaUnavailableError,
    RequestError,
)
from shared_cache.hashing import block_hashes
from tests.fakes import FAKE_TEXT, TOKENS_PER_BLOCK, FakeEngine

PROMPT = tuple(range(300, 310))


class LocalRouter:
    """A `RouterClient` on a real router, in this process."""

    def __init__(self) -> None:
        self.router = Router(RouterConfig(policy="round_robin"), TOKENS_PER_BLOCK, shares=True)
        self.is_away = False
        self.num_routes = 0

    async def route(self, hashes, num_prompt_tokens, avoid=(), output_tokens=None):
        if self.is_away:
            raise ReplicaUnavailableError("the router restarts")
        return self.route_now(hashes, num_prompt_tokens, tuple(avoid), output_tokens)

    def route_now(self, hashes, num_tokens, avoid=(), output_tokens=None):
        self.num_routes += 1
        keys = routing_keys(hashes)
        request = RouteRequest(self.num_routes, num_tokens, keys, avoid, output_tokens)
        return self.router.route(request)

    def first_token(self, request_id, receipt, prefill_s=None):
        self.router.take(FirstToken(request_id, receipt, None, prefill_s))

    def finished(self, request_id, hashes, output_tokens=0):
        new_keys = routing_keys(hashes)
        self.router.take(Finished(request_id, new_keys, output_tokens))

    def mark_dead(self, replica_id, boot_id):
        self.router.mark_dead(replica_id, boot_id)


class DyingReplica:
    """A `ReplicaClient` that dies after `lives_for` chunks; `engine` takes every request."""

    def __init__(self, engine: FakeEngine, lives_for: int | None = None) -> None:
        self.engine = engine
        self.lives_for = lives_for

    async def generate(self, request) -> AsyncGenerator[TokenChunk, None]:
        num_chunks = 0
        async with aclosing(self.engine.generate(request)) as stream:
            async for chunk in stream:
                if num_chunks == self.lives_for:
                    break
                num_chunks += 1
                yield chunk
            else:
                return
        raise ReplicaUnavailableError("died")


class RecordingMetrics:
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def first_token(self, replica_id, ttft_s, receipt):
        self.events.append(("first_token", replica_id, receipt.prompt_tokens))

    def tokens(self, replica_id, num_generated, num_accepted, gap_s):
        pass

    def failover(self, replica_id):
        self.events.append(("failover", replica_id))

    def finished(self, outcome):
        self.events.append(("finished", outcome))


class Setup:
    """A dispatcher over named replicas, all alive."""

    def __init__(self, replicas: dict[str, DyingReplica], **config) -> None:
        self.router = LocalRouter()
        self.metrics = RecordingMetrics()
        self.replicas = replicas
        for name in replicas:
            self.router.router.register(ReplicaInfo(name, "1"))
        settings = {"replica_wait_s": 0.2, "poll_interval_s": 0.01, **config}
        settings.setdefault("first_wait_s", settings["replica_wait_s"])
        self.dispatcher = Dispatcher(
            self.router,
            replicas.__getitem__,
            TOKENS_PER_BLOCK,
            DispatchConfig(**settings),
            self.metrics,
        )

    async def collect(self, request):
        async with aclosing(self.dispatcher.generate(request)) as stream:
            return [routed async for routed in stream]


def request(max_tokens=40, **sampling) -> GenerationRequest:
    return GenerationRequest("r", PROMPT, SamplingParams(max_tokens=max_tokens, **sampling))


def tokens_of(routed) -> bytes:
    return bytes(token for one in routed for token in one.chunk.token_ids)


def text_of(routed) -> str:
    return "".join(one.chunk.text for one in routed)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("stop", [(), ("本 🙂!",), ("never ", "日本")])
async def test_death_at_every_chunk_changes_nothing(group, stop):
    plain = Setup({"a": DyingReplica(FakeEngine(group))})
    expected = await plain.collect(request(stop=stop))
    for lives_for in range(len(expected)):
        engines = FakeEngine(group), FakeEngine(group)
        setup = Setup({"a": DyingReplica(engines[0], lives_for), "b": DyingReplica(engines[1])})
        routed = await setup.collect(request(stop=stop))
        assert tokens_of(routed) == tokens_of(expected)
        assert text_of(routed) == text_of(expected)
        reasons = [one.chunk.finish_reason for one in routed]
        assert reasons[-1] == expected[-1].chunk.finish_reason
        assert reasons[:-1] == [None] * (len(routed) - 1)
        assert [one.chunk.receipt is not None for one in routed].count(True) == 1
        assert routed[0].chunk.receipt.prompt_tokens == len(PROMPT)
        assert (routed[-1].replica_id, routed[-1].num_failovers) == ("b", 1)
        assert ("failover", "a") in setup.metrics.events


async def test_text_without_deaths_is_the_engines_text():
    num_bytes = len(FAKE_TEXT[:16].encode())
    routed = await Setup({"a": DyingReplica(FakeEngine())}).collect(request(num_bytes))
    assert text_of(routed) == FAKE_TEXT[:16]


async def test_a_chain_of_deaths_is_survived():
    replicas = {name: DyingReplica(FakeEngine(), 3) for name in "abcd"}
    replicas["e"] = DyingReplica(FakeEngine())
    routed = await Setup(replicas).collect(request(40))
    assert tokens_of(routed) == FAKE_TEXT.encode()[:40]
    assert {one.replica_id for one in routed} == set("abcde")


async def test_the_seed_is_the_same_on_every_replica_and_given_when_missing():
    replicas = {"a": DyingReplica(FakeEngine(), 2), "b": DyingReplica(FakeEngine())}
    await Setup(replicas).collect(request(temperature=1.0))
    seeds = {one.engine.requests[0].sampling.seed for one in replicas.values()}
    assert len(seeds) == 1
    assert None not in seeds
    kept = DyingReplica(FakeEngine())
    await Setup({"a": kept}).collect(request(seed=7))
    assert kept.engine.requests[0].sampling.seed == 7


async def test_attempts_are_bounded():
    replicas = {name: DyingReplica(FakeEngine(), 1) for name in "abcd"}
    setup = Setup(replicas, max_attempts=3)
    with pytest.raises(ReplicaUnavailableError, match="3 replicas failed"):
        await setup.collect(request())
    assert setup.metrics.events[-1] == ("finished", "unavailable")
    assert sum(len(one.engine.requests) for one in replicas.values()) == 3


@pytest.mark.parametrize("num_tokens_first", [0, 4])
async def test_a_request_that_replicas_die_of_does_not_take_the_whole_cluster(num_tokens_first):
    replicas = {name: DyingReplica(FakeEngine(), 0) for name in "abcde"}
    replicas["a"].lives_for = num_tokens_first
    setup = Setup(replicas)
    with pytest.raises(ReplicaUnavailableError, match="may be the cause"):
        await setup.collect(request())
    num_died = 3 if num_tokens_first else 2  # the death after a token was not in vain
    assert sum(len(one.engine.requests) for one in replicas.values()) == num_died
    snapshot = setup.router.router.snapshot()
    assert [one.alive for one in snapshot.replicas].count(True) == 5 - num_died
    assert setup.metrics.events[-1] == ("finished", "unavailable")


class RefusingReplica(DyingReplica):
    """Raises `error` instead of taking a request, until it is None."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(FakeEngine())
        self.error = error
        self.num_asked = 0

    async def generate(self, request) -> AsyncGenerator[TokenChunk, None]:
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        async for chunk in super().generate(request):
            yield chunk


async def test_replicas_that_take_no_requests_did_not_die_of_this_one():
    refused = ReplicaRefusedError("draining")
    replicas = {name: RefusingReplica(refused) for name in "abc"}
    routed = await Setup(replicas | {"d": DyingReplica(FakeEngine())}).collect(request(20))
    assert tokens_of(routed) == FAKE_TEXT.encode()[:20]
    assert routed[-1].num_failovers == 3


async def nowhere() -> Address:
    raise ReplicaUnavailableError("no actor runs now")


async def closed_port() -> Address:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", probe.getsockname()[1], b"")


@pytest.mark.parametrize("find", [nowhere, closed_port])
async def test_replicas_that_cannot_be_reached_did_not_die_of_this_one(find):
    """A machine takes all its replicas with it."""
    gone = [WireReplica(str(number), find) for number in range(4)]
    first = DyingReplica(FakeEngine(), lives_for=3)
    setup = Setup(
        {"a": first, **dict(zip("bcde", gone, strict=True)), "f": DyingReplica(FakeEngine())}
    )
    routed = await setup.collect(request(20))
    assert tokens_of(routed) == FAKE_TEXT.encode()[:20]
    assert routed[-1].replica_id == "f"


async def test_a_death_after_the_last_token_is_no_loss():
    class Forgetful(DyingReplica):
        async def generate(self, request):
            async for chunk in self.engine.generate(request):
                yield replace(chunk, finish_reason=None)
            raise ReplicaUnavailableError("died")

    setup = Setup({"a": Forgetful(FakeEngine()), "b": DyingReplica(FakeEngine())})
    routed = await setup.collect(request(20))
    assert tokens_of(routed) == FAKE_TEXT.encode()[:20]
    assert [one.chunk.finish_reason for one in routed if one.chunk.finish_reason] == ["length"]


async def test_a_full_replica_is_passed_over_and_stays_alive():
    full = RefusingReplica(ReplicaBusyError("full"))
    setup = Setup({"a": full, "b": DyingReplica(FakeEngine())}, max_attempts=1, replica_wait_s=0)
    for _ in range(2):
        routed = await setup.collect(request(20))
        assert (routed[0].replica_id, routed[-1].num_failovers) == ("b", 0)
    assert full.num_asked
    snapshot = setup.router.router.snapshot()
    assert all(one.alive for one in snapshot.replicas)
    assert snapshot.num_reservations == 0
    assert not [event for event in setup.metrics.events if event[0] == "failover"]


async def test_waits_for_a_full_cluster_and_then_says_so():
    replicas = {name: RefusingReplica(ReplicaBusyError("full")) for name in "ab"}
    setup = Setup(replicas, max_attempts=1, replica_wait_s=0.05)
    with pytest.raises(ReplicaUnavailableError, match="all replicas stayed full"):
        await setup.collect(request())
    setup = Setup(replicas, max_attempts=1, replica_wait_s=30)
    task = asyncio.create_task(setup.collect(request(20)))
    num_asked = replicas["b"].num_asked
    while replicas["b"].num_asked < num_asked + 2:
        await asyncio.sleep(0.01)
    replicas["b"].error = None
    assert {one.replica_id for one in await task} == {"b"}


async def test_an_abort_that_nobody_asked_for_is_a_death():
    class Closing(DyingReplica):
        async def generate(self, request):
            yield TokenChunk((FAKE_TEXT.encode()[0],), FAKE_TEXT[0])
            yield TokenChunk((), "", finish_reason="abort")

    setup = Setup({"a": Closing(FakeEngine()), "b": DyingReplica(FakeEngine())})
    routed = await setup.collect(request(20))
    assert tokens_of(routed) == FAKE_TEXT.encode()[:20]
    assert [one.chunk.finish_reason for one in routed if one.chunk.finish_reason] == ["length"]


async def test_waits_for_a_replica_to_come_back():
    setup = Setup({"a": DyingReplica(FakeEngine(), 5)}, replica_wait_s=30)
    stream = setup.dispatcher.generate(request(20))
    routed = [await anext(stream) for _ in range(5)]
    rest = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.03)
    assert not rest.done()
    setup.router.is_away = True
    await asyncio.sleep(0.03)
    setup.router.is_away = False
    setup.replicas["a"].lives_for = None
    setup.router.router.register(ReplicaInfo("a", "2"))
    routed.append(await rest)
    routed += [one async for one in stream]
    assert tokens_of(routed) == FAKE_TEXT.encode()[:20]


async def test_gives_up_when_no_replica_comes():
    setup = Setup({})
    with pytest.raises(ReplicaUnavailableError, match="no replica came up"):
        await setup.collect(request())


async def test_a_bad_request_is_not_tried_elsewhere_and_kills_nobody():
    replicas = {name: DyingReplica(FakeEngine(max_total_tokens=20)) for name in "ab"}
    setup = Setup(replicas)
    with pytest.raises(RequestError):
        await setup.collect(request(max_tokens=400))
    snapshot = setup.router.router.snapshot()
    assert all(one.alive for one in snapshot.replicas)
    assert snapshot.num_reservations == 0
    assert setup.metrics.events == [("finished", "rejected")]


async def test_closing_the_stream_aborts_and_ends_the_reservation():
    replica = DyingReplica(FakeEngine())
    setup = Setup({"a": replica})
    stream = setup.dispatcher.generate(request())
    await anext(stream)
    assert setup.router.router.snapshot().num_reservations == 1
    await stream.aclose()
    assert replica.engine.num_aborted == 1
    assert setup.router.router.snapshot().num_reservations == 0
    assert setup.metrics.events[-1] == ("finished", "cancelled")


async def test_the_router_learns_prompt_and_output():
    setup = Setup({"a": DyingReplica(FakeEngine())})
    routed = await setup.collect(request(11))
    sequence = PROMPT + tuple(tokens_of(routed))
    hashes = block_hashes(sequence, TOKENS_PER_BLOCK)
    known = setup.router.route_now(hashes, len(sequence)).known_tokens
    assert known == (len(sequence) - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK


async def test_nothing_is_learned_from_a_request_that_never_started():
    setup = Setup({"a": DyingReplica(FakeEngine(), 0)}, max_attempts=1)
    with pytest.raises(ReplicaUnavailableError):
        await setup.collect(request())
    setup.router.router.register(ReplicaInfo("a", "2"))
    route = setup.router.route_now(block_hashes(PROMPT, TOKENS_PER_BLOCK), len(PROMPT))
    assert (route.known_tokens, route.shared_tokens) == (0, 0)
