"""The whole path on a real Ray: OpenAI's client, Serve, router, two replicas, a file store."""

import asyncio
import json
import os
import signal
import socket
import time

import httpx
import openai
import pytest
import ray

from actors.replica_health import ReplicaStats
from cluster import cli
from cluster.app import application, build
from cluster.clients import RAY_NAMESPACE
from cluster.config import ClusterConfig
from shared_cache.errors import ConfigError
from tests.tiny_model import make_tiny_model, tiny_source

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BLOCK = 8
DOCUMENT = "The quick brown fox jumps over the lazy dog; the lazy dog sleeps on. " * 4
PATIENCE_S = 40.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def named_actors() -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {one["name"] for one in actors if one["namespace"] == RAY_NAMESPACE}


def actor(name: str):
    return ray.get_actor(name, namespace=RAY_NAMESPACE)


class Endpoint:
    """A deployed application and what the tests ask it with."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.url = f"http://127.0.0.1:{config.serve.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def complete(self, prompt, max_tokens=12, **options):
        options = {"model": "tiny", "temperature": 0, **options}
        return self.client.completions.create(prompt=prompt, max_tokens=max_tokens, **options)

    def flush(self) -> None:
        replicas = [actor(name) for name in self.config.replica_names]
        assert all(ray.get([one.flush.remote(10) for one in replicas], timeout=20))

    def alive(self) -> dict[str, bool]:
        return httpx.get(f"{self.url}/ready").json()["replicas"]

    def stats(self) -> list[ReplicaStats]:
        calls = [actor(name).stats.remote() for name in self.config.replica_names]
        return ray.get(calls, timeout=20)

    def outstanding(self) -> int:
        return sum(stats.num_outstanding for stats in self.stats())

    def busiest(self) -> ReplicaStats:
        """The replica with the most open requests: the router may give all of them to either."""
        return max(self.stats(), key=lambda stats: stats.num_outstanding)


def eventually(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "did not come true in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def endpoint(ray_session, tmp_path_factory):
    from ray import serve

    folder = tmp_path_factory.mktemp("app")
    model = tiny_source(make_tiny_model(folder / "model"))
    engine = {
        "torch_threads": 1,
        "kv_cache_config": {"tokens_per_block": BLOCK, "max_tokens": 8192},
    }
    config = ClusterConfig(
        name="app",
        model="tiny",
        num_cpus_per_replica=0.5,
        engine=engine,
        cache={"store": str(folder / "store"), "host": {"bytes": "64MiB"}},
        router={"policy": "round_robin"},
        serve={"port": free_port()},
    )
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    serve.start(http_options={"host": "127.0.0.1", "port": config.serve.port}, logging_config=quiet)
    serve.run(application(config, model), name="app", logging_config=quiet)
    endpoint = Endpoint(config)
    yield endpoint
    endpoint.client.close()
    serve.delete("app")
    assert not {name for name in named_actors() if name.startswith("app")}
    serve.shutdown()


def test_a_prefix_is_computed_once_for_all_replicas(endpoint):
    first = endpoint.complete(DOCUMENT + "Who jumps?")
    endpoint.flush()
    second = endpoint.complete(DOCUMENT + "Who jumps?")
    third = endpoint.complete(DOCUMENT + "Who jumps?")
    answers = (first, second, third)
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert [one.usage.prompt_tokens_details.cached_tokens > 0 for one in answers] == [0, 1, 1]
    tiers = [answer.kvcommons for answer in answers]
    assert tiers[0]["replica"] == tiers[2]["replica"] != tiers[1]["replica"]
    assert tiers[0]["computed"] == first.usage.prompt_tokens
    reusable = (first.usage.prompt_tokens - 1) // BLOCK * BLOCK
    assert (tiers[1]["host"], tiers[1]["device"]) == (reusable, 0), "one arena for both"
    assert (tiers[2]["shared"], tiers[2]["device"]) == (0, reusable)


def test_requests_of_different_salts_share_nothing(endpoint):
    def cached_tokens(salt: str) -> int:
        answer = endpoint.complete(DOCUMENT + "Salted?", extra_body={"cache_salt": salt})
        return answer.usage.prompt_tokens_details.cached_tokens

    def chat_cached_tokens(salt: str) -> int:
        answer = endpoint.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": DOCUMENT + "Salted?"}],
            max_completion_tokens=4,
            extra_body={"cache_salt": salt},
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    for ask in (cached_tokens, chat_cached_tokens):
        assert ask("one tenant") == 0
        endpoint.flush()
        assert ask("another tenant") == 0
        endpoint.flush()
        assert min(ask(salt) for salt in ("one tenant", "another tenant")) > 0


def test_status_tells_what_replicas_and_router_say(endpoint, capsys):
    endpoint.complete(DOCUMENT + "Who jumps?")
    assert cli.status(endpoint.config) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in endpoint.config.replica_names)
    assert cli.status(endpoint.config, as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["router"]["policy"] == "round_robin"
    replicas = data["replicas"]
    assert [one["state"] for one in replicas.values()] == ["ready", "ready"]
    assert all(one["kvCacheStats"]["tokensPerBlock"] == BLOCK for one in replicas.values())
    assert sum(one["kvCacheStats"]["reusedBlocks"] for one in replicas.values()) > 0
    requests_so_far = 10  # each may lose the block of its last turn to the copies' time budget
    assert sum(one["cache"]["dropped_saves"] for one in replicas.values()) <= requests_so_far


def test_completion_stream_says_the_same(endpoint):
    whole = endpoint.complete("Once upon a time", 20)
    stream = endpoint.complete(
        "Once upon a time", 20, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    text = "".join(event.choices[0].text for event in events if event.choices)
    assert text == whole.choices[0].text
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "is not served here"),
        ({"temperature": 5}, openai.BadRequestError, "temperature"),
        ({"prompt": "x" * 9000, "stream": True}, openai.BadRequestError, "together have at most"),
    ],
)
def test_errors_have_openais_shape(endpoint, options, error, text):
    with pytest.raises(error, match=text) as caught:
        endpoint.complete(**{"prompt": "a", **options})
    assert caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_a_client_that_goes_away_aborts_its_request(endpoint):
    stream = endpoint.complete("Once", 900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert endpoint.outstanding() == 1
    stream.close()
    eventually(lambda: endpoint.outstanding() == 0)


async def test_kill_9_loses_no_request_and_changes_no_output(endpoint):
    prompts = [f"{DOCUMENT} Question {number}:" for number in range(6)]
    extra = {"ignore_eos": True}
    expected = [endpoint.complete(one, 300, extra_body=extra).choices[0].text for one in prompts]
    has_begun = asyncio.Event()

    async def ask(client, prompt):
        text = ""
        stream = await client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=300,
            temperature=0,
            stream=True,
            extra_body=extra,
        )
        async for event in stream:
            text += event.choices[0].text
            has_begun.set()
        return text

    async with openai.AsyncOpenAI(
        base_url=f"{endpoint.url}/v1", api_key="unused", max_retries=0
    ) as client:
        answers = [asyncio.create_task(ask(client, prompt)) for prompt in prompts]
        await has_begun.wait()
        victim = await asyncio.to_thread(endpoint.busiest)
        before = victim.health
        assert victim.num_outstanding > 0
        os.kill(before.pid, signal.SIGKILL)
        assert await asyncio.gather(*answers) == expected
    await asyncio.to_thread(eventually, lambda: all(endpoint.alive().values()))
    after = await actor(before.name).health.remote()
    assert (after.state, after.boot_id != before.boot_id) == ("ready", True)


def test_figures_reach_the_prometheus_port(endpoint):
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = (
        "ray_kvcommons_requests_total",
        "ray_kvcommons_ttft_seconds_bucket",
        "ray_kvcommons_generated_tokens_total",
        "ray_kvcommons_failovers_total",
        'tier="host"',
        'tier="device"',
        'tier="computed"',
        'replica="app-replica-0"',
        'outcome="rejected"',
        'outcome="cancelled"',
    )

    def are_all_there() -> bool:
        figures = httpx.get(url).text
        return all(one in figures for one in wanted)

    eventually(are_all_there)


def test_build_refuses_wrong_arguments():
    with pytest.raises(ConfigError, match="config=PATH"):
        build({"konfig": "x.yaml"})
    with pytest.raises(ConfigError, match="no file"):
        build({"config": "does-not-exist.yaml"})
