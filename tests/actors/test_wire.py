"""A replica's socket: what goes in comes out at the other end, and nothing is left hanging."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest

from actors.engine import GenerationRequest, Receipt, SamplingParams, TokenChunk, TokenLogprob
from actors.wire import protocol, server
from actors.wire.client import WireClient
from actors.wire.protocol import Frames, frame
from actors.wire.server import Address, WireServer
from actors.wire.sockets import LOST_AFTER_S
from shared_cache.errors import ReplicaBusyError, ReplicaUnavailableError, RequestError
from shared_cache.hashing import ReuseScope
from tests.fakes import FakeEngine

HOST = "127.0.0.1"
CHUNKS = (
    TokenChunk((1, 2), "ab", 1, None, Receipt(9, 4, 2, 1, 2), 0.5, 0.25),
    TokenChunk((3,), "ü", logprobs=(TokenLogprob(-0.5, ((3, -0.5), (7, -1.5))),)),
    TokenChunk((4,), "", finish_reason="length"),
)
REQUEST = GenerationRequest(
    "r", tuple(range(10)), SamplingParams(6, 0.5, 0.9, 4, 2**62, ("x",), (5,), True, 3)
)


async def some_chunks(request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
    for chunk in CHUNKS:
        yield chunk


@pytest.fixture
async def connect():
    servers, clients = [], []

    async def make(generate, **changes) -> WireClient:
        servers.append(WireServer(generate))
        address = await servers[-1].listen(HOST)
        clients.append(await WireClient.connect("replica", replace(address, **changes)))
        return clients[-1]

    yield make
    for one in (*clients, *servers):
        one.close()
    await asyncio.sleep(0)


async def collect(stream):
    async with aclosing(stream):
        return [item async for item in stream]


async def until(condition) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 30)


async def test_requests_and_chunks_arrive_as_they_were_sent(connect):
    asked = []

    async def generate(request):
        asked.append(request)
        async for chunk in some_chunks(request):
            yield chunk

    client = await connect(generate)
    request = replace(REQUEST, scope=ReuseScope("salt", "adapter"), num_output_so_far=3)
    assert await collect(client.generate(request)) == list(CHUNKS)
    assert asked == [request]


async def test_many_requests_share_a_connection(connect):
    engine = FakeEngine()
    client = await connect(engine.generate)
    sizes = [3, 1, 40, 7]
    asked = [GenerationRequest(str(n), (1, 2), SamplingParams(n)) for n in sizes]
    answers = await asyncio.gather(*[collect(client.generate(one)) for one in asked])
    assert [sum(len(c.token_ids) for c in chunks) for chunks in answers] == sizes


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it, others lack it")
async def test_a_machine_that_is_gone_is_noticed_by_both_whatever_is_under_way():
    served = []
    one = WireServer(some_chunks)
    one._connection = lambda: served.append(WireServer._connection(one)) or served[-1]
    client = await WireClient.connect("replica", await one.listen(HOST))
    await until(lambda: served and hasattr(served[0], "_transport"))
    for transport in (client._link._transport, served[0]._transport):
        raw = transport.get_extra_info("socket")
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        limit_ms = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert limit_ms == LOST_AFTER_S * 1000 <= 15_000
    client.close()
    one.close()
    await asyncio.sleep(0)


async def test_strangers_are_cut_off_before_they_take_memory_or_time(monkeypatch):
    one = WireServer(some_chunks)
    address = await one.listen(HOST)
    hello = frame(protocol.Hello(address.secret))
    long_ask = frame(protocol.Ask(1, replace(REQUEST, prompt_token_ids=tuple(range(10_000)))))
    for sent, patience_s, is_served in (
        (b"", 0.1, False),
        (long_ask[:200], 600.0, False),
        (hello + long_ask, 600.0, True),
    ):
        monkeypatch.setattr(server, "HELLO_TIMEOUT_S", patience_s)
        reader, writer = await asyncio.open_connection(HOST, address.port)
        writer.write(sent)
        try:
            answer = await asyncio.wait_for(reader.read(1), 30)
        except ConnectionResetError:
            answer = b""
        assert bool(answer) == is_served
        writer.close()
    one.close()
    await asyncio.sleep(0)


async def test_closing_a_stream_aborts_it_in_the_engine(connect):
    engine = FakeEngine()
    client = await connect(engine.generate)
    stream = client.generate(replace(REQUEST, sampling=SamplingParams(200)))
    await anext(stream)
    engine.gate.clear()
    await stream.aclose()
    await until(lambda: engine.num_aborted == 1)
    assert engine.num_running == 0


async def test_a_caller_that_goes_away_leaves_nothing_running(connect):
    engine = FakeEngine()
    client = await connect(engine.generate)
    engine.gate.clear()
    task = asyncio.create_task(collect(client.generate(REQUEST)))
    await until(lambda: engine.num_running == 1)
    client.close()
    with pytest.raises(ReplicaUnavailableError, match="connection to it was lost"):
        await task
    await until(lambda: engine.num_running == 0)
    with pytest.raises(ReplicaUnavailableError, match="no connection"):
        await collect(client.generate(REQUEST))


@pytest.mark.parametrize("error", [RequestError("too long"), ReplicaBusyError("full")])
async def test_errors_keep_their_class_and_come_after_what_came_before(connect, error):
    async def generate(request):
        yield CHUNKS[0]
        raise error

    stream = (await connect(generate)).generate(REQUEST)
    assert await anext(stream) == CHUNKS[0]
    with pytest.raises(type(error), match=str(error)):
        await anext(stream)


async def test_a_bug_in_the_engine_is_an_error_that_names_it(connect):
    async def generate(request):
        raise KeyError("oops")
        yield

    client = await connect(generate)
    with pytest.raises(RuntimeError, match="replica failed: KeyError"):
        await collect(client.generate(REQUEST))


async def test_who_does_not_know_the_secret_is_not_heard(connect):
    engine = FakeEngine()
    client = await connect(engine.generate, secret=b"guess")
    with pytest.raises(ReplicaUnavailableError):
        await collect(client.generate(REQUEST))
    assert not engine.requests


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_garbage_ends_its_own_connection_only(connect, garbage):
    wire = WireServer(some_chunks)
    address = await wire.listen(HOST)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(garbage)
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    client = await WireClient.connect("replica", address)
    assert await collect(client.generate(REQUEST)) == list(CHUNKS)
    client.close()
    wire.close()


async def test_nobody_listens():
    async with await asyncio.start_server(lambda *_: None, HOST, 0) as closed:
        port = closed.sockets[0].getsockname()[1]
    with pytest.raises(ReplicaUnavailableError, match="cannot be reached"):
        await WireClient.connect("replica", Address(HOST, port, b""))


async def test_a_caller_that_does_not_read_holds_up_its_own_requests_alone(connect, monkeypatch):
    monkeypatch.setattr(server, "MAX_UNREAD_BYTES", 1 << 16)
    num_made = 0

    async def generate(request):
        nonlocal num_made
        for _ in range(2000):
            num_made += 1
            yield TokenChunk((1,), "x" * 10_000)
            await asyncio.sleep(0)

    wire = WireServer(generate)
    address = await wire.listen(HOST)
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=1 << 12)
    writer.write(frame(protocol.Hello(address.secret)) + frame(protocol.Ask(1, REQUEST)))
    seen = -1
    while seen != num_made or not seen:
        seen = num_made
        await asyncio.sleep(0.05)
    assert 0 < num_made < 2000, "it waits for the reader"
    other = await WireClient.connect("replica", address)
    stream = other.generate(REQUEST)
    assert (await anext(stream)).token_ids == (1,)
    await stream.aclose()
    while num_made < 2000:
        await reader.read(1 << 20)
    writer.close()
    other.close()
    wire.close()


def test_frames_may_come_in_pieces():
    messages = [protocol.Cancel(number) for number in range(5)]
    data = b"".join(map(frame, messages))
    for size in (1, 3, len(data)):
        frames, bodies = Frames(), []
        for start in range(0, len(data), size):
            bodies += frames.feed(data[start : start + size])
        assert [protocol.to_replica.decode(body) for body in bodies] == messages
