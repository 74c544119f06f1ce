"""OpenAI's own client, and one that is built on it, against the endpoint over HTTP."""

import asyncio
import json
import math
import time

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI

from tests.endpoint.conftest import Served

PROMPT = "Once upon a time"
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A colour?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a word",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as one:
        yield one


def complete(client, prompt=PROMPT, max_tokens=12, **options):
    options = {"model": "tiny", "temperature": 0, **options}
    return client.completions.create(prompt=prompt, max_tokens=max_tokens, **options)


def chat(client, **options):
    options = {"model": "tiny", "temperature": 0, "messages": QUESTION, **options}
    return client.chat.completions.create(max_completion_tokens=12, **options)


def eventually(condition) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "did not come true in time"
        time.sleep(0.01)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 2048
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("gpt-5")


def test_an_answer_its_stream_and_its_receipt(client):
    whole = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0
    )
    answer = whole.parse()
    stream = complete(client, max_tokens=20, stream=True, stream_options={"include_usage": True})
    events = list(stream)
    text = "".join(event.choices[0].text for event in events if event.choices)
    assert text == answer.choices[0].text
    assert len(text) > 5
    assert events[-2].choices[0].finish_reason == answer.choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == answer.usage.completion_tokens == 20
    receipt = answer.kvcommons
    tiers = ("device", "host", "shared", "computed")
    assert sum(receipt[tier] for tier in tiers) == answer.usage.prompt_tokens == len(PROMPT)
    assert receipt["ttft_ms"] > 0
    assert receipt["predicted_ttft_ms"] == 500
    header = whole.headers["x-kvcommons-receipt"]
    assert f'computed={receipt["computed"]}, replica="{receipt["replica"]}"' in header
    assert "x-kvcommons-receipt" in stream.response.headers


def test_a_chat_its_stream_and_its_template(client):
    answer = chat(client)
    assert answer.choices[0].message.role == "assistant"
    events = list(chat(client, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == answer.choices[0].message.content
    template = "system: Be brief.\nuser: A colour?\nassistant: "
    assert answer.usage.prompt_tokens == len(template)


def test_tools_reach_the_template_unless_none_shall_be_called(client):
    plain = chat(client).usage.prompt_tokens
    told = chat(client, tools=[TOOL]).usage.prompt_tokens
    assert told - plain == len(f"tools: {json.dumps([TOOL])}\n")
    assert chat(client, tools=[TOOL], tool_choice="none").usage.prompt_tokens == plain
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "red"},
    ]
    assert chat(client, messages=turns, tools=[TOOL]).choices[0].message.content is not None


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_and_prompts(client, stream):
    alone = [
        complete(client, prompt, temperature=1, seed=5 + number).choices[0].text
        for prompt in ("abc", "xyz")
        for number in range(3)
    ]
    assert len(set(alone)) == 6
    answer = complete(client, ["abc", "xyz"], n=3, temperature=1, seed=5, stream=stream)
    texts = [""] * 6
    for event in answer if stream else [answer]:
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == alone
    if not stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 72)


def test_the_choices_of_a_prompt_compute_it_once(client):
    prompt = "x" * 200
    answer = chat(client, messages=[{"role": "user", "content": prompt}], n=4)
    assert len({choice.message.content for choice in answer.choices}) == 1, "greedy"
    again = chat(client, messages=[{"role": "user", "content": prompt}])
    assert answer.usage.prompt_tokens == again.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client, stream):
    answer = chat(client, logprobs=True, top_logprobs=2, stream=stream)
    events = list(answer) if stream else [answer]
    choices = [event.choices[0] for event in events]
    items = [item for one in choices if one.logprobs for item in one.logprobs.content]
    assert len(items) == 12
    said = b"".join(bytes(item.bytes) for item in items).decode(errors="replace")
    message = "".join((one.delta if stream else one.message).content or "" for one in choices)
    assert said == message
    for item in items:
        assert item.top_logprobs[0].logprob == pytest.approx(item.logprob, abs=1e-4), "greedy"
        assert item.top_logprobs[0].token == item.token
        assert 0 < sum(math.exp(one.logprob) for one in item.top_logprobs) <= 1 + 1e-6
    assert chat(client).choices[0].logprobs is None


def test_log_probabilities_of_a_completion(client):
    answer = complete(client, logprobs=3)
    noted = answer.choices[0].logprobs
    assert len(noted.tokens) == len(noted.token_logprobs) == len(noted.top_logprobs) == 12
    assert all(len(one) == 3 for one in noted.top_logprobs)
    lengths = [1 if "bytes:" in token else len(token) for token in noted.tokens]
    assert noted.text_offset == [sum(lengths[:place]) for place in range(12)]
    only = complete(client, logprobs=0).choices[0].logprobs
    assert only.token_logprobs == pytest.approx(noted.token_logprobs, abs=1e-4)
    assert only.top_logprobs == [{}] * 12


def test_a_seed_repeats_and_a_stop_string_stops(client):
    texts = {complete(client, "a", 20, temperature=1, seed=7).choices[0].text for _ in range(2)}
    assert len(texts) == 1
    text = complete(client, max_tokens=20).choices[0].text
    stop = text[3:5]
    stopped = complete(client, max_tokens=20, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    events = list(complete(client, max_tokens=20, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in events) == stopped.text


@pytest.mark.parametrize(
    ("options", "error", "text", "code"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "is not served here", "model_not_found"),
        ({"temperature": 5}, openai.BadRequestError, "temperature", None),
        ({"n": 99}, openai.BadRequestError, "n: ", None),
        ({"extra_body": {"best_off": 3}}, openai.BadRequestError, "best_off: .*supported", None),
        ({"prompt": "x" * 9000}, openai.BadRequestError, "9000 tokens", "context_length_exceeded"),
        ({"prompt": ""}, openai.BadRequestError, "empty", None),
        ({"prompt": [10**6]}, openai.BadRequestError, "vocabulary", None),
        (
            {"prompt": "x" * 9000, "stream": True},
            openai.BadRequestError,
            "9000 tokens",
            "context_length_exceeded",
        ),
    ],
)
def test_errors_have_openais_shape(client, options, error, text, code):
    with pytest.raises(error, match=text) as caught:
        complete(client, **{"prompt": "a", **options})
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nothing", b"", 404),
        ("GET", "/v1/completions", b"", 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400),
    ],
)
def test_what_is_no_request_has_an_error_of_that_shape_too(http, method, path, body, status):
    answer = http.request(method, path, content=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_tokens_and_back(http):
    tokens = http.post("/tokenize", json={"prompt": "Grüße"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len("Grüße".encode())
    back = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "Grüße"}
    asked = {"messages": QUESTION, "tools": [TOOL]}
    assert http.post("/tokenize", json=asked).json()["count"] > 60
    for path, body in (
        ("/detokenize", {"tokens": [10**6]}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": QUESTION}),
    ):
        assert http.post(path, json=body).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a", "model": "gpt"}).status_code == 404


@pytest.mark.parametrize("kind", ["stream", "whole"])
async def test_a_client_that_goes_away_aborts_its_request(served: Served, kind):
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
        asked = {**body, "stream": kind == "stream"}
        task = asyncio.create_task(http.post("/v1/completions", json=asked))
        await asyncio.to_thread(eventually, lambda: served.num_outstanding == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(eventually, lambda: served.num_outstanding == 0)
    assert served.endpoint.gate.num_inside == 0
    assert served.router.num_open == 0


async def test_the_async_client_and_its_cancellation(served: Served):
    options = {"api_key": "unused", "max_retries": 0, "base_url": f"{served.url}/v1"}
    async with openai.AsyncOpenAI(**options) as client:
        answers = await asyncio.gather(
            *[complete(client, f"{PROMPT} {number}") for number in range(8)]
        )
        assert all(one.usage.completion_tokens == 12 for one in answers)
        stream = await complete(
            client, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
    await asyncio.to_thread(eventually, lambda: served.num_outstanding == 0)


async def test_langchain(served: Served, client):
    model = ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key="unused",
        model="tiny",
        temperature=0,
        max_tokens=12,
        max_retries=0,
    )
    messages = [("system", "Be brief."), ("human", "A colour?")]
    answer = model.invoke(messages)
    assert answer.content == chat(client).choices[0].message.content
    assert answer.usage_metadata["output_tokens"] == 12
    assert "".join(one.content for one in model.stream(messages)) == answer.content
    parts = [one async for one in model.astream(messages)]
    assert "".join(one.content for one in parts) == answer.content
    assert (
        model.bind_tools([TOOL]).invoke(messages).usage_metadata["input_tokens"]
        > (answer.usage_metadata["input_tokens"])
    )
