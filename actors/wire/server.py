"""A replica's socket: callers ask, chunks go out as they are made, what is not waited for is ended.

A message through Ray costs about a millisecond on each side, more than a small model needs for a
token and a quarter of what the whole way of a short request may take. On a socket a chunk costs
some ten microseconds; and a caller that dies is noticed by its connection, at once.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import msgspec

from actors.engine import GenerationRequest, TokenChunk
from actors.wire import protocol as wire
from actors.wire.sockets import notice_loss
from shared_cache.errors import KvcommonsError

logger = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 4 << 20
"""Of what a caller has not read, at which its requests wait."""

HELLO_TIMEOUT_S = 5.0
"""A caller that has not shown by then that it knows the secret is cut off."""

Generate = Callable[[GenerationRequest], AsyncGenerator[TokenChunk, None]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica's process listens, and what a caller has to know to be heard."""

    host: str
    port: int
    secret: bytes


class WireServer:
    """Serves `generate` to callers; make and use it on one event loop."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._secret = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._lock = asyncio.Lock()

    async def listen(self, host: str) -> Address:
        """Begin to listen on a free port, or tell where it listens already."""
        async with self._lock:
            if self._server is None:
                loop = asyncio.get_running_loop()
                self._server = await loop.create_server(self._connection, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Address(host, port, self._secret)

    def close(self) -> None:
        """Listen no more; connections go on. From any thread."""
        if self._server is not None:
            self._server.get_loop().call_soon_threadsafe(self._server.close)

    def _connection(self) -> "_Connection":
        return _Connection(self._generate, self._secret)


class _Connection(asyncio.Protocol):
    """One caller. Anything that is no message of its ends its connection, and nothing else."""

    def __init__(self, generate: Generate, secret: bytes) -> None:
        self._generate = generate
        self._secret = secret
        self._frames = wire.Frames(wire.MAX_HELLO_BYTES)
        self._is_known = False
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._out: list[bytes] = []
        self._may_write = asyncio.Event()
        self._may_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(MAX_UNREAD_BYTES)
        notice_loss(transport)
        asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self._cut_off_strangers)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._handle(wire.to_replica.decode(body))
        except (ValueError, msgspec.DecodeError) as error:
            logger.warning("a caller is cut off: %s", error)
            self._transport.abort()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._may_write.set()
        for task in self._tasks.values():
            task.cancel()

    def _cut_off_strangers(self) -> None:
        if not self._is_known:
            self._transport.abort()

    def _handle(self, message: wire.ToReplica) -> None:
        if isinstance(message, wire.Hello):
            self._is_known = hmac.compare_digest(message.secret, self._secret)
        if not self._is_known:
            raise ValueError("it does not know the secret of this process")
        self._frames.max_bytes = wire.MAX_FRAME_BYTES
        if isinstance(message, wire.Ask):
            number = message.number
            task = asyncio.get_running_loop().create_task(self._serve(number, message.request))
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number, None))
        elif isinstance(message, wire.Cancel) and message.number in self._tasks:
            self._tasks[message.number].cancel()

    async def _serve(self, number: int, request: GenerationRequest) -> None:
        ended = wire.Ended(number)
        try:
            async with aclosing(self._generate(request)) as chunks:
                async for chunk in chunks:
                    self._send(wire.Came(number, chunk))
                    if not self._may_write.is_set():
                        await self._may_write.wait()
        except KvcommonsError as error:
            ended = wire.Ended(number, type(error).__name__, str(error))
        except Exception as error:
            logger.exception("request %s failed", request.request_id)
            ended = wire.Ended(number, type(error).__name__, repr(error))
        self._send(ended)

    def _send(self, message: wire.ToCaller) -> None:
        """Send with everything else of this turn of the event loop."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(wire.frame(message))

    def _flush(self) -> None:
        out, self._out = self._out, []
        if not self._transport.is_closing():
            self._transport.write(b"".join(out))
