"""What an endpoint says that is full, or that nobody stands behind; and that it forgets nobody."""

import asyncio
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from cluster.endpoint import health_routes, router_view
from cluster.endpoint.gate import DrainRate, Gate
from cluster.endpoint.refusals import OverloadedError
from tests.endpoint.conftest import Served, serving
from tests.fakes import FakeEngine

PLACES = 4
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 8}


@pytest.fixture
def slow(model_path) -> Iterator[Served]:
    """Two engines that wait at their gates; `engines` are in the order of their building."""
    engines: list[FakeEngine] = []

    def build(config) -> FakeEngine:
        engines.append(FakeEngine(turn_s=0.001))
        return engines[-1]

    limits = {"max_places": PLACES, "max_body_bytes": 2000, "request_timeout_s": 600}
    with serving(model_path, build=build, **limits) as served:
        served.engines = engines
        with httpx.Client(base_url=served.url, timeout=60) as served.http:
            yield served


def close_gates(served: Served) -> None:
    for engine in served.engines:
        served.loop.call_soon_threadsafe(engine.gate.clear)


def open_gates(served: Served) -> None:
    for engine in served.engines:
        served.loop.call_soon_threadsafe(engine.gate.set)


async def until(condition) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


async def test_a_full_endpoint_says_when_to_come_again(slow):
    close_gates(slow)
    async with httpx.AsyncClient(base_url=slow.url, timeout=60) as http:
        inside = [
            asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(PLACES)
        ]
        await until(lambda: slow.endpoint.gate.num_inside == PLACES)
        refused = await http.post("/v1/completions", json=BODY)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        streamed = await http.post("/v1/completions", json={**BODY, "stream": True})
        assert streamed.status_code == 429
        open_gates(slow)
        assert {(await one).status_code for one in inside} == {200}
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    assert slow.endpoint.gate.num_inside == 0


async def test_openais_client_tries_again_by_itself(slow):
    assert slow.http.post("/v1/completions", json=BODY).status_code == 200
    close_gates(slow)
    options = {"api_key": "unused", "base_url": f"{slow.url}/v1"}
    async with openai.AsyncOpenAI(**options, max_retries=5) as client:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 8}
        tasks = [asyncio.create_task(client.completions.create(**asked)) for _ in range(PLACES + 1)]
        await until(lambda: slow.endpoint.gate.num_inside == PLACES)
        open_gates(slow)
        answers = await asyncio.gather(*tasks)
    assert all(one.usage.completion_tokens == 8 for one in answers)


def test_a_request_of_many_choices_takes_many_places(slow):
    asked = {**BODY, "n": PLACES}
    assert slow.http.post("/v1/completions", json=asked).status_code == 200
    assert slow.http.post("/v1/completions", json={**BODY, "n": 16}).status_code == 200, "alone"
    assert slow.endpoint.gate.num_inside == 0


def test_without_a_replica_it_is_503(slow):
    slow.router.dead.update(slow.replicas)
    for stream in (False, True):
        answer = slow.http.post("/v1/completions", json={**BODY, "stream": stream})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "no_replica"
    for path in ("/health", "/ready"):
        answer = slow.http.get(path)
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["no replica is up"])
    slow.router.is_away = True
    assert slow.http.get("/health").status_code == 503


def test_full_replicas_are_429_not_503(slow, monkeypatch):
    for one in slow.replicas.values():
        monkeypatch.setattr(one, "_max_outstanding", 0)
    answer = slow.http.post("/v1/completions", json=BODY)
    assert answer.status_code == 429
    assert "retry-after" in answer.headers


def test_health_asks_for_a_token_when_none_came_lately(slow, monkeypatch):
    assert slow.http.get("/health").json()["replicas"] == {"replica-0": True, "replica-1": True}
    assert sum(len(engine.requests) for engine in slow.engines) == 1
    assert slow.http.get("/health").status_code == 200
    assert sum(len(engine.requests) for engine in slow.engines) == 1, "one came just now"
    slow.endpoint.last_token_s = float("-inf")
    close_gates(slow)
    monkeypatch.setattr(health_routes, "PROBE_TIMEOUT_S", 0.1)
    answer = slow.http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert "no token came out" in answer.json()["reasons"][0]
    assert slow.http.get("/ready").status_code == 200


async def forever() -> None:
    await asyncio.sleep(1000)


def test_a_token_that_came_just_now_is_health_whatever_the_router_does(slow, monkeypatch):
    assert slow.http.post("/v1/completions", json=BODY).status_code == 200
    slow.router.is_away = True
    assert slow.http.get("/health").status_code == 200
    monkeypatch.setattr(slow.router, "snapshot", forever)
    assert slow.http.get("/health", timeout=2).status_code == 200


@pytest.mark.parametrize("hangs", [False, True])
def test_a_router_that_is_away_does_not_keep_tokens_from_being_asked_for(slow, monkeypatch, hangs):
    monkeypatch.setattr(router_view, "SNAPSHOT_TIMEOUT_S", 0.1)
    slow.router.is_away = True
    if hangs:
        monkeypatch.setattr(slow.router, "snapshot", forever)
    assert slow.http.get("/health", timeout=10).status_code == 200
    assert sum(len(engine.requests) for engine in slow.engines) == 1
    answer = slow.http.get("/ready", timeout=10)
    assert answer.status_code == 503
    assert ("does not answer within" if hangs else "no actor") in answer.json()["reasons"][0]


def test_a_condition_of_readiness_that_hangs_is_a_reason(slow, monkeypatch):
    monkeypatch.setattr(health_routes, "CHECK_TIMEOUT_S", 0.1)
    slow.endpoint.readiness.append(forever)
    answer = slow.http.get("/ready", timeout=10)
    assert answer.status_code == 503
    assert "could not be looked at" in answer.json()["reasons"][0]


def test_readiness_has_further_conditions(slow):
    async def not_yet() -> str | None:
        return "the doctor has not been here"

    slow.endpoint.readiness.append(not_yet)
    answer = slow.http.get("/ready")
    assert (answer.status_code, answer.json()["reasons"]) == (503, ["the doctor has not been here"])


def test_a_body_that_is_too_long(slow):
    text = b"x" * 3000

    def pieces():
        yield text

    for content in (text, pieces()):
        answer = slow.http.post("/v1/completions", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert slow.http.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(model_path, stream):
    engines: list[FakeEngine] = []

    def build(config) -> FakeEngine:
        engines.append(FakeEngine(turn_s=0.001))
        return engines[-1]

    with serving(model_path, build=build, request_timeout_s=0.3) as served:
        asked = {**BODY, "stream": stream, "max_tokens": 100_000 // 50}
        answer = httpx.post(f"{served.url}/v1/completions", json=asked, timeout=60)
        if stream:
            assert answer.status_code == 200
            assert '"code":"request_timeout"' in answer.text.splitlines()[-2]
        else:
            assert answer.status_code == 504
        assert sum(engine.num_running for engine in engines) == 0
        assert served.endpoint.gate.num_inside == 0


def test_the_wait_that_is_named_comes_from_the_measured_rate():
    gate = Gate(10)
    for second in range(20):
        gate.enter(2, float(second))
        gate.leave(2, float(second))
    gate.enter(10, 20.0)
    waits = []
    for _ in range(6):
        with pytest.raises(OverloadedError) as caught:
            gate.enter(1, 20.0)
        waits.append(caught.value.retry_after_s)
    assert waits == [1, 1, 2, 2, 3, 3], "two places a second, and who was refused is in front"
    with pytest.raises(OverloadedError) as caught:
        gate.enter(1, 25.0)
    assert caught.value.retry_after_s == 1


def test_a_gate_that_nobody_leaves_names_some_wait():
    gate = Gate(1)
    gate.enter(1, 0.0)
    with pytest.raises(OverloadedError) as caught:
        gate.enter(1, 0.0)
    assert caught.value.retry_after_s == 5


def test_the_rate_forgets():
    rate = DrainRate()
    assert rate.per_s(0.0) == 0
    rate.freed(30, 0.0)
    rate.freed(30, 10.0)
    assert rate.per_s(10.0) == pytest.approx(6)
    assert rate.per_s(31.0) == pytest.approx(30 / 21)
    assert rate.per_s(60.0) == 0
