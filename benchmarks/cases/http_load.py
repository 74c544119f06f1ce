"""A load generator that costs less than what it loads: HTTP/1.1 on bare asyncio streams."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `first_s` is the time to the first byte of the body; `body` all of it."""

    status: int
    headers: dict[str, str]
    body: bytes
    first_s: float
    total_s: float


class Connection:
    """One kept-alive connection."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        """Send, and read the whole answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=1 << 22)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        started_s = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
        parts: list[bytes] = []
        first_s = 0.0
        async with _parts(reader, headers) as body_parts:
            async for part in body_parts:
                first_s = first_s or time.perf_counter() - started_s
                parts.append(part)
        if headers.get("connection", "") == "close":
            self.close()
        total_s = time.perf_counter() - started_s
        return Answer(status, headers, b"".join(parts), first_s, total_s)

    def close(self) -> None:
        """Close it; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def hammer(
    host: str, port: int, path: str, make: Callable[[int], dict[str, Any]], num: int, at_once: int
) -> tuple[float, list[Answer]]:
    """Send `num` requests over `at_once` connections, each as soon as it can; seconds, answers."""
    numbers = iter(range(num))
    answers: list[Answer] = []

    async def client() -> None:
        connection = Connection(host, port)
        try:
            for number in numbers:
                answers.append(await connection.post(path, make(number)))  # noqa: PERF401
        finally:
            connection.close()

    started_s = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(at_once)])
    return time.perf_counter() - started_s, answers


def _head(data: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = data.decode("latin-1").rstrip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


@asynccontextmanager
async def _parts(
    reader: asyncio.StreamReader, headers: dict[str, str]
) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
    async def chunked() -> AsyncGenerator[bytes, None]:
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)

    async def whole() -> AsyncGenerator[bytes, None]:
        length = int(headers.get("content-length", 0))
        if length:
            yield await reader.readexactly(length)

    parts = chunked() if headers.get("transfer-encoding") == "chunked" else whole()
    try:
        yield parts
    finally:
        with suppress(Exception):
            await parts.aclose()
