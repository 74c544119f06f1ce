"""Streams whose replica is killed with `kill -9`, or drained, go on elsewhere as if nothing was.

Real processes, engines and sockets; what is compared is the whole stream as OpenAI's client reads
it, with its text, tokens and log-probabilities, against that of a request that nobody disturbed.
"""

import asyncio
import itertools
from dataclasses import dataclass, field

import openai
import pytest

from actors.wire.client import WireReplica
from tests.endpoint.conftest import NAMES, Served, replica_config, serving, serving_through
from tests.endpoint.replica_process import ReplicaProcess

NUM_KILLS = 20
MAX_ROUNDS = 60
PROMPT = "Tell me a story of a fox and a lazy dog, and of what they did. "
REQUESTS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1, "seed": 11, "top_p": 0.9},
    "choices": {"temperature": 1, "seed": 4, "n": 2, "logprobs": 2},
    "stop": {"temperature": 0, "logprobs": 1},
}
"""No draw of these seeds is closer to the border between two tokens than 3e-4. Sums in float32 that
are made in another order differ by 1e-5, and would decide a closer one in another way.
"""


@dataclass
class Heard:
    """What a client heard: texts and tokens by choice, and the receipt."""

    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    num_tokens: int = 0
    num_failovers: int = 0

    def add(self, event) -> None:
        for choice in event.choices:
            self.texts[choice.index] = self.texts.get(choice.index, "") + choice.text
            if choice.logprobs is not None:
                self.tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
                noted = choice.logprobs.token_logprobs
                self.logprobs.setdefault(choice.index, []).extend(noted)
            if choice.finish_reason is not None:
                self.reasons[choice.index] = choice.finish_reason
        if event.usage is not None:
            self.num_tokens = event.usage.completion_tokens
            self.num_failovers = event.kvcommons["failovers"]


async def hear(client: openai.AsyncOpenAI, options: dict, num_events: int = 0, act=None) -> Heard:
    """Read a stream; after `num_events` events, `act`."""
    heard = Heard()
    stream = await client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "top_k": 4},
        **options,
    )
    number = 0
    async for event in stream:
        heard.add(event)
        number += 1
        if number == num_events:
            await act(stream.response.headers["x-kvcommons-receipt"])
    return heard


def client_of(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


def assert_same(heard: Heard, expected: Heard) -> None:
    assert heard.texts == expected.texts
    assert heard.tokens == expected.tokens
    assert heard.reasons == expected.reasons
    assert heard.num_tokens == expected.num_tokens
    for index, noted in expected.logprobs.items():
        assert heard.logprobs[index] == pytest.approx(noted, abs=1e-3)


async def expectations(client: openai.AsyncOpenAI) -> dict[str, Heard]:
    """What undisturbed requests say; the stop string of one is taken from what it says."""
    text = (await hear(client, REQUESTS["greedy"])).texts[0]
    REQUESTS["stop"]["stop"] = text[60:64]
    return {name: await hear(client, options) for name, options in REQUESTS.items()}


@pytest.fixture
def processes(model_path, tmp_path):
    cache = {"store": str(tmp_path), "host": {"scope": "process", "bytes": 1 << 22}}
    made = {name: ReplicaProcess(replica_config(name, model_path, cache)) for name in NAMES}
    for one in made.values():
        one.start()
    yield made
    for one in made.values():
        one.kill()


@pytest.mark.timeout(600)
async def test_a_replica_is_killed_in_mid_stream_twenty_times(model_path, processes):
    clients = {name: WireReplica(name, one.find) for name, one in processes.items()}
    with serving_through(model_path, clients, {}) as served:
        async with client_of(served) as client:
            expected = await expectations(client)
            assert len(set(map(repr, expected.values()))) == len(REQUESTS)

            async def kill(receipt: str) -> None:
                name = next(name for name in NAMES if name in receipt)
                processes[name].kill()

            num_lost = 0
            modes = itertools.cycle(REQUESTS)
            for number in range(MAX_ROUNDS):
                mode = next(modes)
                heard = await hear(client, REQUESTS[mode], 1 + number % 7, kill)
                assert_same(heard, expected[mode])
                num_lost += bool(heard.num_failovers)
                for name, one in processes.items():
                    if not one.process.is_alive():
                        await asyncio.to_thread(one.start)
                        served.router.dead.discard(name)
                if num_lost == NUM_KILLS:
                    break
            assert num_lost == NUM_KILLS
        assert served.router.num_open == 0
        assert served.endpoint.gate.num_inside == 0


@pytest.mark.parametrize("mode", ["greedy", "choices"])
async def test_a_replica_that_is_drained_in_mid_stream_hands_its_requests_on(model_path, mode):
    with serving(model_path) as served:
        async with client_of(served) as client:
            expected = await hear(client, REQUESTS[mode])

            async def drain(receipt: str) -> None:
                replica = next(one for name, one in served.replicas.items() if name in receipt)

                async def end() -> None:
                    assert not await replica.drain(0.01), "the stream goes on"
                    await replica.close()

                ending = asyncio.run_coroutine_threadsafe(end(), served.loop)
                await asyncio.wrap_future(ending)

            heard = await hear(client, REQUESTS[mode], 2, drain)
    assert_same(heard, expected)
    assert heard.num_failovers >= 1
