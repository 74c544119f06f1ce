"""A caller's side of a replica's socket: one connection, many requests, no request left hanging.

What ends the connection (a killed process, a machine that is gone) ends every request on it with
`ReplicaUnavailableError`, so that each of them can go on elsewhere.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import cast

import msgspec

from actors.engine import GenerationRequest, TokenChunk
from actors.wire import protocol as wire
from actors.wire.server import Address
from actors.wire.sockets import notice_loss
from shared_cache import errors
from shared_cache.errors import KvcommonsError, ReplicaRefusedError, ReplicaUnavailableError

CONNECT_TIMEOUT_S = 5.0

_ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, KvcommonsError)
}


class WireClient:
    """A connection to one process of a replica; for one event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._link = _Link(name)
        self._keeper = _closed_with_loop(self._link)

    @classmethod
    async def connect(cls, name: str, address: Address) -> "WireClient":
        """A connection to the process at `address`; raises `ReplicaRefusedError`."""
        client = cls(name)
        try:
            connecting = asyncio.get_running_loop().create_connection(
                lambda: client._link, address.host, address.port
            )
            await asyncio.wait_for(connecting, CONNECT_TIMEOUT_S)
        except (OSError, asyncio.TimeoutError) as error:
            raise ReplicaRefusedError(f"{name} cannot be reached: {error}") from error
        await anext(client._keeper)
        client._link.send(wire.Hello(address.secret))
        return client

    @property
    def is_open(self) -> bool:
        """Whether requests may still be sent."""
        return self._link.is_open

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """What the replica makes of it; closing this cancels it there.

        Raises the replica's error, `ReplicaRefusedError` when the request could not be sent, or
        `ReplicaUnavailableError` when the connection is lost after that.
        """
        asked = self._link.ask(request)
        try:
            while True:
                for message in await asked.next():
                    if isinstance(message, wire.Ended):
                        asked.has_ended = True
                        self._raise_if_failed(message)
                        return
                    yield message.chunk
        finally:
            self._link.end(asked)

    def close(self) -> None:
        """Close the connection; what runs on it is cancelled."""
        self._link.close()

    def _raise_if_failed(self, ended: wire.Ended) -> None:
        if ended.error is None:
            return
        kind = _ERRORS.get(ended.error)
        if kind is None:
            raise RuntimeError(f"{self._name} failed: {ended.text}")
        raise kind(ended.text)


async def _closed_with_loop(link: "_Link") -> AsyncGenerator[None, None]:
    """Closes the link when its event loop, or who holds this, ends: nobody else could then."""
    try:
        yield
    finally:
        link.close()


class WireReplica:
    """A `ReplicaClient` that connects when it is first used, and again after each loss.

    `find` tells where the replica's process listens now; it raises `ReplicaUnavailableError`.
    """

    def __init__(self, name: str, find: Callable[[], Awaitable[Address]]) -> None:
        self._name = name
        self._find = find
        self._connecting = asyncio.Lock()
        self._client: WireClient | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `EngineReplica.generate`."""
        client = self._client
        if client is None or not client.is_open:
            client = await self._connected()
        async with aclosing(client.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    def close(self) -> None:
        """Close the connection, if there is one; what runs on it is cancelled."""
        if self._client is not None:
            self._client.close()

    async def _connected(self) -> WireClient:
        async with self._connecting:
            if self._client is None or not self._client.is_open:
                self._client = await WireClient.connect(self._name, await self._address())
            return self._client

    async def _address(self) -> Address:
        try:
            return await self._find()
        except ReplicaUnavailableError as error:  # it has not even heard of the request
            raise ReplicaRefusedError(str(error)) from error


class _Asked:
    """One request and what has come for it."""

    __slots__ = ("_messages", "_waiter", "has_ended", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.has_ended = False
        self._messages: deque[wire.ToCaller] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, message: wire.ToCaller) -> None:
        self._messages.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[wire.ToCaller]:
        """Everything that has come; waits for something."""
        if not self._messages:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        messages = list(self._messages)
        self._messages.clear()
        return messages


class _Link(asyncio.Protocol):
    """The connection itself."""

    def __init__(self, name: str) -> None:
        self.is_open = True
        self._name = name
        self._frames = wire.Frames()
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        notice_loss(transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                message = wire.to_caller.decode(body)
                asked = self._asked.get(message.number)
                if asked is not None:
                    asked.put(message)
        except (ValueError, msgspec.DecodeError):
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        text = f"{self._name} is away: the connection to it was lost"
        for asked in self._asked.values():
            asked.put(wire.Ended(asked.number, ReplicaUnavailableError.__name__, text))

    def send(self, message: wire.ToReplica) -> None:
        if self._transport is not None and self.is_open:
            self._transport.write(wire.frame(message))

    def ask(self, request: GenerationRequest) -> _Asked:
        """Send a request; raises `ReplicaRefusedError` once the connection is lost."""
        if not self.is_open:
            raise ReplicaRefusedError(f"{self._name} is away: no connection to it")
        asked = _Asked(next(self._numbers))
        self._asked[asked.number] = asked
        self.send(wire.Ask(asked.number, request))
        return asked

    def end(self, asked: _Asked) -> None:
        """Nobody waits for this one any more."""
        del self._asked[asked.number]
        if not asked.has_ended:
            self.send(wire.Cancel(asked.number))

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()
