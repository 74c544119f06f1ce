"""The endpoint in front of an engine that answers at once: what is left is the endpoint."""

import statistics
import time
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve

from actors.engine import GenerationRequest, SamplingParams
from actors.wire.client import WireReplica
from benchmarks.cases.endpoint_cluster import HOST, Measured, Port, deployed
from benchmarks.cases.http_load import Connection, hammer
from benchmarks.cases.instant_engine import build_instant_engine
from cluster.app import application
from cluster.clients import ReplicaAddress
from cluster.config import ClusterConfig
from cluster.endpoint.prompts import PromptEncoder
from cluster.models import resolve_model

NAME = "endpoint-benchmark"
PATH = "/v1/completions"
PROMPT = "The quick brown fox jumps over the lazy dog. "
LONG_REPEATS = 400
NUM_TTFT, NUM_LONG = 200, 40
NUM_REQUESTS, AT_ONCE = 1200, 32
NUM_STREAMS, STREAM_TOKENS, STREAMS_AT_ONCE = 128, 1024, 32
NUM_ROUNDS = 3

empty = FastAPI()


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
@serve.ingress(empty)
class Empty:
    """What Ray Serve can do at most."""

    @empty.post("/empty")
    async def nothing(self) -> dict[str, str]:
        return {}


async def measure(divisor: int) -> Measured:
    """All figures of speed, with this part of the requests."""
    num = NUM_REQUESTS // divisor
    model = resolve_model("smollm2-135m")
    config = ClusterConfig(
        name=NAME,
        model=model.name,
        replicas=1,
        num_cpus_per_replica=0.5,
        engine={"torch_threads": 1},
        serve={"port": Port.number, "max_places": 512},
    )
    with deployed(lambda _: Empty.bind(), "empty"):
        ceilings = [await _rate("/empty", {}, num) for _ in range(NUM_ROUNDS)]
    with deployed(lambda _: application(config, model, build_instant_engine), NAME):
        body = _body(model.name, PROMPT, 16)
        await _rate(PATH, body, num // 4)
        rates = [await _rate(PATH, body, num) for _ in range(NUM_ROUNDS)]
        streams = [
            await _stream_rate(model.name, NUM_STREAMS // divisor) for _ in range(NUM_ROUNDS)
        ]
        encoder = PromptEncoder(model.path)
        short = await _added(config, encoder, PROMPT, NUM_TTFT // divisor)
        long = await _added(config, encoder, PROMPT * LONG_REPEATS, NUM_LONG // divisor)
    figures = {
        "added_ttft_ms_median": round(short["added_ms"], 2),
        "requests_per_s": round(statistics.median(rates), 1),
        "serve_ceiling_requests_per_s": round(statistics.median(ceilings), 1),
        "stream_tokens_per_s": round(statistics.median(streams)),
    }
    details = {
        "requests_per_s_rounds": rates,
        "serve_ceiling_rounds": ceilings,
        "stream_tokens_per_s_rounds": streams,
        "ttft_short": short,
        "ttft_long": long,
    }
    return Measured(figures, details)


def _body(model: str, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}


async def _rate(path: str, body: dict[str, Any], num: int) -> float:
    seconds, answers = await hammer(HOST, Port.number, path, lambda _: body, num, AT_ONCE)
    assert {one.status for one in answers} == {200}, answers[0].body
    return num / seconds


async def _stream_rate(model: str, num: int) -> float:
    body = _body(model, PROMPT, STREAM_TOKENS, stream=True)
    seconds, answers = await hammer(HOST, Port.number, PATH, lambda _: body, num, STREAMS_AT_ONCE)
    for one in answers:
        assert one.body.count(b" word") == STREAM_TOKENS, "a stream is not whole"
    return num * STREAM_TOKENS / seconds


async def _added(
    config: ClusterConfig, encoder: PromptEncoder, prompt: str, num: int
) -> dict[str, float]:
    """Median milliseconds to the first token, directly and over HTTP, in turns; the difference.

    The client tokenises nothing for the direct call; what that takes is given beside it and, for
    long prompts, is most of the difference.
    """
    tokens = encoder.text(prompt)
    name = config.replica_names[0]
    replica = WireReplica(name, ReplicaAddress(name).find)
    connection = Connection(HOST, Port.number)
    body = _body(config.model, prompt, 16, stream=True)
    request = GenerationRequest("direct", tokens, SamplingParams(16))
    direct, over_http, tokenising = [], [], []
    for _ in range(num):
        started_s = time.perf_counter()
        async with aclosing(replica.generate(request)) as chunks:
            await anext(chunks)
            direct.append(time.perf_counter() - started_s)
            async for _ in chunks:
                pass
        over_http.append((await connection.post(PATH, body)).first_s)
        started_s = time.perf_counter()
        encoder.text(prompt)
        tokenising.append(time.perf_counter() - started_s)
    replica.close()
    connection.close()
    medians = [statistics.median(one) * 1e3 for one in (direct, over_http, tokenising)]
    return {
        "prompt_tokens": len(tokens),
        "direct_ms": medians[0],
        "http_ms": medians[1],
        "tokenising_ms": medians[2],
        "added_ms": medians[1] - medians[0],
        "added_beyond_tokenising_ms": medians[1] - medians[0] - medians[2],
    }
