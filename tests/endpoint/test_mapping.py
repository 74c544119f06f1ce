"""The OpenAI mapping, read back with OpenAI's own types."""

from typing import get_args, get_type_hints

import pytest
from openai.types import Completion, Model
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from actors.dispatch import RoutedChunk
from actors.engine import Receipt, TokenChunk
from cluster.endpoint import errors, replies
from cluster.endpoint.replies import Choice, Reply
from cluster.endpoint.requests import ChatRequest, CompletionRequest
from cluster.endpoint.streaming import Collector
from shared_cache.errors import ReplicaUnavailableError, RequestError

CHUNKS = [
    TokenChunk((1,), "Hel", receipt=Receipt(100, 32, 16, 8, 44)),
    TokenChunk((2, 3), "lo", num_accepted=1),
    TokenChunk((4,), "", finish_reason="length"),
]
ROUTED = [RoutedChunk(chunk, "replica-1", ttft_s=0.0125) for chunk in CHUNKS]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
REPLY = Reply.new("cmpl", "m")
HELLO = [{"role": "user", "content": "hello"}]


def choice() -> Choice:
    made = Choice()
    for routed in ROUTED:
        made.add(routed)
    return made


def events_of(make):
    """A stream in which each chunk comes alone."""
    collector = Collector(1, None)
    return [make(*news) for one in ROUTED for news in collector.add([(0, one)])]


def test_completion_with_usage_and_tiers():
    body = REPLY.completion([choice(), choice()])
    read = Completion.model_validate(body, strict=True)
    assert [one.text for one in read.choices] == ["Hello", "Hello"]
    assert [(one.index, one.finish_reason) for one in read.choices] == [
        (0, "length"),
        (1, "length"),
    ]
    assert (read.usage.prompt_tokens, read.usage.completion_tokens) == (200, 8)
    assert read.usage.total_tokens == 208
    assert read.usage.prompt_tokens_details.cached_tokens == 112
    assert read.usage.completion_tokens_details.accepted_prediction_tokens == 2
    assert body["kvcommons"] == {
        "device": 64,
        "host": 32,
        "shared": 16,
        "computed": 88,
        "replica": "replica-1",
        "ttft_ms": 12.5,
        "predicted_ttft_ms": None,
        "failovers": 0,
    }
    assert REPLY.receipt_header([choice()])["x-kvcommons-receipt"] == (
        'device=32, host=16, shared=8, computed=44, replica="replica-1", ttft-ms=12.5'
    )


def test_chat_answer():
    read = ChatCompletion.model_validate(REPLY.chat([choice()]), strict=True)
    assert read.choices[0].message.content == "Hello"
    assert read.choices[0].message.role == "assistant"
    assert read.choices[0].finish_reason == "length"
    assert read.usage.prompt_tokens_details.cached_tokens == 56


def test_chat_stream_adds_up():
    events = [REPLY.chat_start(0), *events_of(REPLY.chat_chunk)]
    read = [ChatCompletionChunk.model_validate(event) for event in events]
    assert "".join(one.choices[0].delta.content or "" for one in read) == "Hello"
    assert read[0].choices[0].delta.role == "assistant"
    assert [one.choices[0].finish_reason for one in read] == [None, None, None, "length"]
    assert all("finish_reason" in event["choices"][0] for event in events)
    assert len({one.id for one in read}) == 1
    last = REPLY.chat_usage([choice()])
    assert last["choices"] == []
    assert ChatCompletionChunk.model_validate(last).usage.prompt_tokens == 100
    assert last["kvcommons"]["shared"] == 8


def test_completion_stream_adds_up():
    events = events_of(REPLY.completion_chunk)
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
    assert {event["choices"][0]["index"] for event in events} == {0}
    for event in events:
        read = Completion.model_construct(**event)
        assert not read.model_extra
    assert REPLY.completion_usage([choice()])["usage"]["completion_tokens"] == 4


def test_models():
    listed = replies.models("m", 5)
    assert listed["object"] == "list"
    assert Model.model_validate(listed["data"][0]).id == "m"
    assert errors.unknown_model("x", "m")["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([0], [[0]]),
    ],
)
def test_prompts_of_every_shape(prompt, expected):
    assert CompletionRequest(model="m", prompt=prompt).prompts == expected


def test_sampling_parameters_are_passed_on():
    body = CompletionRequest(
        model="m", prompt="a", temperature=0.5, top_p=0.9, seed=3, stop=["x", ""], top_k=4
    )
    sampling = body.sampling(9)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.9)
    assert (sampling.seed, sampling.stop, sampling.top_k) == (3, ("x",), 4)
    plain = CompletionRequest(model="m", prompt="a", stop="end").sampling(1)
    assert (plain.temperature, plain.seed, plain.stop) == (1.0, None, ("end",))


def test_chat_messages_and_limits():
    body = ChatRequest(
        model="m",
        max_tokens=3,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
    )
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
    ]
    assert body.limit == 3
    newer = ChatRequest(model="m", max_completion_tokens=5, messages=body.messages)
    assert newer.limit == 5
    assert ChatRequest(model="m", messages=body.messages).limit is None


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"best_off": None}, "best_off", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"cache_salt": "a\x1fb"}, "cache_salt", "pattern"),
        ({"echo": True}, "echo", "False"),
        ({"suffix": "x"}, "suffix", ""),
        ({"store": True}, "store", "False"),
        ({"service_tier": "flex"}, "service_tier", "'auto'"),
        ({"stop": ["x"] * 17}, "stop", "stop: List should have at most 16 items"),
        ({"stop": "x" * 257}, "stop", "at most 256 characters"),
        ({"stop": 3}, "stop", "list"),
        ({"prompt": ["x"] * 65}, "prompt", "prompt: at most 64 prompts in one request, not 65"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
        ({"cache_salt": "x" * 257}, "cache_salt", "at most 256 characters"),
        ({"cache_salt": "\ud800"}, "cache_salt", "string"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": [-1]}, "prompt", ""),
        ({"presence_penalty": 1}, "presence_penalty", "0"),
        ({"model": None}, "model", "string"),
    ],
)
def test_what_is_not_honoured_is_refused(fields, param, text):
    with pytest.raises(ValidationError) as caught:
        CompletionRequest(**{"model": "m", "prompt": "a", **fields})
    error = errors.invalid(caught.value.errors())["error"]
    assert error["param"] == param
    assert text in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'text'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools.0.function: Field required"),
        ({"tool_choice": "required"}, "tool_choice", "'none'"),
        ({"modalities": ["audio"]}, "modalities", "'text'"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"prediction": {"type": "content"}}, "prediction", "not supported"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "content"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages",
            "messages.0.tool_calls.0.id: Field required",
        ),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
            "messages",
            "made by the assistant",
        ),
    ],
)
def test_what_a_chat_does_not_honour_is_refused(fields, param, text):
    with pytest.raises(ValidationError) as caught:
        ChatRequest(**{"model": "m", "messages": HELLO, **fields})
    error = errors.invalid(caught.value.errors())["error"]
    assert error["param"] == param
    assert text in error["message"]


NEUTRAL = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "user": "me",
    "safety_identifier": "me",
    "prompt_cache_key": "k",
    "metadata": {"run": "7"},
    "store": False,
    "service_tier": "auto",
}
NEUTRAL_CHAT = {
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "verbosity": "medium",
}
NEUTRAL_COMPLETION = {"best_of": 1, "echo": False, "suffix": ""}


def nulls(request_type) -> dict[str, None]:
    fields = request_type.model_fields.items()
    return {name: None for name, field in fields if not field.is_required()}


@pytest.mark.parametrize("fields", [NEUTRAL | NEUTRAL_CHAT, nulls(ChatRequest)])
def test_a_chat_with_values_that_change_nothing_is_the_plain_one(fields):
    plain = ChatRequest(model="m", messages=HELLO)
    full = ChatRequest(model="m", messages=HELLO, **fields)
    assert full.sampling(5) == plain.sampling(5)
    assert (full.limit, full.stream, full.cache_salt) == (None, False, None)


@pytest.mark.parametrize("fields", [NEUTRAL | NEUTRAL_COMPLETION, nulls(CompletionRequest)])
def test_a_completion_with_values_that_change_nothing_is_the_plain_one(fields):
    plain = CompletionRequest(model="m", prompt="a")
    full = CompletionRequest(model="m", prompt="a", **fields)
    assert full.sampling(5) == plain.sampling(5)
    assert (full.max_tokens, full.stream, full.cache_salt) == (None, False, None)


def test_openais_nulls_are_those_of_its_own_types():
    """A client may send null for every parameter that OpenAI says is nullable."""
    for request_type, params in (
        (ChatRequest, chat_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, completion_params.CompletionCreateParamsNonStreaming),
    ):
        hints = get_type_hints(params)
        nullable = {name for name, hint in hints.items() if type(None) in get_args(hint)}
        assert len(nullable) > 5
        assert nullable <= set(request_type.model_fields)


def test_an_answer_may_be_sent_back_with_its_empty_fields():
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None}
    echoed = answer | {"function_call": None, "audio": None, "annotations": []}
    body = ChatRequest(model="m", messages=[*HELLO, echoed])
    assert body.messages[1].for_template() == {"role": "assistant", "content": "Hi"}


def test_limits_of_stops_and_prompts_are_allowed():
    body = CompletionRequest(model="m", prompt=["x"] * 64, stop=["y" * 256] * 16)
    assert (len(body.prompts), len(body.sampling(1).stop)) == (64, 16)
    assert len(CompletionRequest(model="m", prompt=[5] * 1000).prompts[0]) == 1000


def test_a_body_that_is_no_json_has_no_parameter_to_blame():
    problem = {"type": "json_invalid", "loc": ("body", 44), "msg": "JSON decode error"}
    error = errors.invalid([problem])["error"]
    assert error["param"] is None
    assert error["message"] == "44: JSON decode error"


def test_stream_options_need_a_stream():
    with pytest.raises(ValidationError, match="needs stream"):
        CompletionRequest(model="m", prompt="a", stream_options={"include_usage": True})
    body = CompletionRequest(
        model="m", prompt="a", stream=True, stream_options={"include_usage": True}
    )
    assert body.includes_usage


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("too long"), 400),
        (ReplicaUnavailableError("later"), 503),
        (RuntimeError("secret"), 500),
    ],
)
def test_errors_have_their_status(error, status):
    got, body, _ = errors.failure(error)
    assert got == status
    assert ("secret" in body["error"]["message"]) is False
    assert set(body["error"]) == {"message", "type", "param", "code"}
