"""Clients that send or read slowly, ask for too much, or leave: nobody else is held up by them."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import httpx
import pytest

from actors.dispatch import RoutedChunk
from actors.engine import Receipt, TokenChunk
from cluster.endpoint import api, streaming
from cluster.endpoint.choices import ready_batches
from cluster.endpoint.keys import KeysDocument, new_key
from cluster.endpoint.refusals import TimedOutError
from tests.endpoint.conftest import NAMES, Served, serving, serving_through

WAIT_S = 30.0
PATH = "/v1/completions"


def until(condition) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@contextmanager
def sent(served: Served, body: bytes, length: int | None = None, key: str = "") -> Iterator:
    """A request on a socket of its own, that says its body is `length` long."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(WAIT_S)
        client.connect((host, int(port)))
        head = [
            f"POST {PATH} HTTP/1.1",
            "Host: x",
            f"Content-Length: {len(body) if length is None else length}",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]
        client.sendall("\r\n".join([*head, "", ""]).encode() + body)
        yield client


class Replica:
    """Says nothing, or more than any buffer takes; counts what runs."""

    def __init__(self, is_silent: bool) -> None:
        self.num_running = self.num_started = 0
        self._is_silent = is_silent

    async def generate(self, request) -> AsyncGenerator[TokenChunk, None]:
        self.num_running += 1
        self.num_started += 1
        try:
            if self._is_silent:
                await asyncio.sleep(1000)
            yield TokenChunk((1,), "x", receipt=Receipt(3, 0, 0, 0, 3))
            while True:
                yield TokenChunk((1,), "x" * 1000)
                await asyncio.sleep(0)
        finally:
            self.num_running -= 1


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_before_the_first_token_leaves_nothing_running(model_path, stream):
    replica = Replica(is_silent=True)
    body = json.dumps({"model": "tiny", "prompt": "abc", "stream": stream}).encode()
    with serving_through(model_path, dict.fromkeys(NAMES, replica), {}) as served:
        with sent(served, body):
            until(lambda: replica.num_running == 1)
        until(lambda: replica.num_running == served.endpoint.gate.num_inside == 0)


def test_who_reads_nothing_is_cut_off_when_the_time_is_up(model_path, monkeypatch):
    monkeypatch.setattr(streaming, "READING_S", 0.2)
    replica = Replica(is_silent=False)
    asked = {"model": "tiny", "prompt": "abc", "stream": True, "max_tokens": 1 << 20}
    with (
        serving_through(
            model_path, dict.fromkeys(NAMES, replica), {}, request_timeout_s=0.5
        ) as served,
        sent(served, json.dumps(asked).encode()),
    ):
        until(lambda: replica.num_started == 1)
        until(lambda: replica.num_running == served.endpoint.gate.num_inside == 0)


async def test_who_reads_slowly_gets_no_more_time():
    async def stream():
        while True:
            yield RoutedChunk(TokenChunk((1,), "x"), "r")
            await asyncio.sleep(0.001)

    async def read_slowly() -> None:
        num_batches = 0
        async for _ in ready_batches([stream], 1, 0.1):
            num_batches += 1
            assert num_batches < 1000
            await asyncio.sleep(0.005)

    with pytest.raises(TimedOutError):
        await read_slowly()


@pytest.fixture(scope="module")
def keyed(model_path) -> Iterator[Served]:
    """Tenants without a limit, with one request a minute, with one choice at a time."""
    made = {name: new_key() for name in ("free", "once", "one")}
    limits = {"once": {"requests_per_minute": 1}, "one": {"max_concurrent": 1}}
    document = KeysDocument.model_validate(
        {
            "tenants": {name: {"salt": f"salt-of-{name}", **limits.get(name, {})} for name in made},
            "keys": [
                {"id": key_id, "tenant": name, "sha256": digest}
                for name, (_, key_id, digest) in made.items()
            ],
        }
    )
    with serving(model_path, document) as served:
        served.headers = {
            name: {"Authorization": f"Bearer {key}"} for name, (key, *_) in made.items()
        }
        yield served


def ask(served: Served, name: str, path: str = PATH, **body) -> httpx.Response:
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 1, **body}
    return httpx.post(served.url + path, json=asked, headers=served.headers[name], timeout=WAIT_S)


def test_who_has_no_key_sends_no_body(keyed):
    with sent(keyed, b"{", length=16_000_000, key="kvc-000000000000-x") as client:
        assert client.recv(100).startswith(b"HTTP/1.1 401")
    with sent(keyed, b"{", length=16_000_000) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 401")


def test_a_body_that_does_not_come_is_not_waited_for(keyed, monkeypatch):
    monkeypatch.setattr(api, "BODY_TIMEOUT_S", 0.1)
    key = keyed.headers["free"]["Authorization"].removeprefix("Bearer ")
    with sent(keyed, b"{", length=100, key=key) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_a_text_that_cannot_fit_is_not_tokenised(keyed, monkeypatch):
    encoder = keyed.endpoint.encoder
    monkeypatch.setattr(encoder, "text", None)
    monkeypatch.setattr(encoder, "chat", None)
    longest = 2048 * encoder.longest_token_chars
    text = "x" * (longest + 1)
    messages = [{"role": "user", "content": text}]
    refused = [
        ask(keyed, "free", prompt=text),
        ask(keyed, "free", prompt=[1] * 2048),
        ask(keyed, "free", "/v1/chat/completions", prompt=None, messages=messages),
    ]
    for answer in refused[:2]:
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert refused[2].status_code == 400
    body = {"model": "tiny", "messages": messages}
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = httpx.post(keyed.url + path, json=body, headers=keyed.headers["free"])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_who_is_over_a_limit_has_nothing_tokenised(keyed, monkeypatch):
    assert ask(keyed, "once").status_code == 200
    monkeypatch.setattr(keyed.endpoint.encoder, "text", None)
    assert ask(keyed, "once", prompt="a " * 2000).status_code == 429
    headers = keyed.headers["once"]
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        answer = httpx.post(keyed.url + path, json=body, headers=headers)
        assert answer.status_code == 429


def test_every_choice_counts_as_one_that_runs(keyed):
    assert ask(keyed, "one").status_code == 200
    refused = [ask(keyed, "one", n=2), ask(keyed, "one", prompt=["a", "b"])]
    assert [one.status_code for one in refused] == [429, 429]
    assert "max_concurrent: 1" in refused[0].json()["error"]["message"]
    assert ask(keyed, "one").status_code == 200, "who was refused holds nothing"


def test_arguments_that_nobody_can_read_are_the_models_own_words(keyed):
    function = {"name": "f", "arguments": "[" * 200_000}
    call = {"id": "1", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
    ]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    for path in ("/v1/chat/completions", "/tokenize"):
        asked = body if path.startswith("/v1") else {"messages": messages}
        answer = httpx.post(keyed.url + path, json=asked, headers=keyed.headers["free"], timeout=60)
        assert answer.status_code < 500
