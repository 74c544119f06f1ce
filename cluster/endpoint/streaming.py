"""From batches of chunks to an HTTP answer: all at once, or as server-sent events.

It prevents two failures of streaming over HTTP: an error that gets status 200 because the headers
had gone out before the first token was sure, and a client that goes away while its request runs on.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from actors.engine import TokenChunk
from cluster.endpoint.choices import Batch, Batches
from cluster.endpoint.errors import failure
from cluster.endpoint.logprobs import Logprobs
from cluster.endpoint.replies import Choice
from cluster.endpoint.waiting import waited_for
from shared_cache.errors import KvcommonsError

logger = logging.getLogger(__name__)

Event = dict[str, Any]
MakeLogprobs = Callable[[TokenChunk, int], tuple[dict[str, Any], int]]
READING_S = 5.0
"""What a client has beyond the time of its request to read the rest of a stream."""

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Shape:
    """How one endpoint's events look; `start` is None where nothing comes before the text."""

    event: Callable[..., Event]
    usage: Callable[[Sequence[Choice]], Event] | None
    start: Callable[[int], Event] | None = None


class Collector:
    """The choices of one answer as they grow. `logprobs` makes a chunk's, if they are wanted."""

    def __init__(self, num_choices: int, logprobs: MakeLogprobs | None) -> None:
        self.choices = [Choice() for _ in range(num_choices)]
        self._logprobs = logprobs

    def add(self, batch: Batch) -> list[tuple[int, str, Any, Any]]:
        """Take a batch in; what is new of each choice in it: index, text, reason, logprobs."""
        texts: dict[int, list[str]] = {}
        parts: dict[int, list[Any]] = {}
        for index, routed in batch:
            choice, chunk = self.choices[index], routed.chunk
            if self._logprobs is not None and chunk.token_ids:
                part, choice.num_chars = self._logprobs(chunk, choice.num_chars)
                parts.setdefault(index, []).append(part)
            choice.add(routed)
            texts.setdefault(index, []).append(chunk.text)
        return [
            (index, "".join(new), self.choices[index].finish_reason, self._part(index, parts))
            for index, new in texts.items()
        ]

    def _part(self, index: int, parts: Mapping[int, list[Any]]) -> Any:
        new = parts.get(index)
        if new is None:
            return None
        self.choices[index].logprobs += new
        return Logprobs.merged(new)


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, its source is closed, which aborts the request.

    A client that reads nothing holds it up for `timeout_s` at most.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: Batches,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
        )
        self._to_close = (events, source)
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._timeout_s)
        except asyncio.TimeoutError:
            logger.warning("a stream is cut off that its client has not read in time")
        finally:
            for generator in self._to_close:
                await generator.aclose()


async def collect(batches: Batches, collector: Collector, receive: Receive) -> list[Choice]:
    """All choices, when they are complete; `ClientGoneError` as soon as the client has left."""
    return await waited_for(_collect(batches, collector), receive)


async def _first_of(batches: Batches) -> Batch:
    return await anext(batches)


async def _collect(batches: Batches, collector: Collector) -> list[Choice]:
    async with aclosing(batches):
        async for batch in batches:
            collector.add(batch)
    return collector.choices


async def event_stream(
    batches: Batches,
    collector: Collector,
    shape: Shape,
    headers: Callable[[Sequence[Choice]], Mapping[str, str]],
    receive: Receive,
    timeout_s: float,
) -> EventStream:
    """The response, once the first chunk is there: errors before it still get their status.

    `ClientGoneError` if the client has left by then.
    """
    try:
        first = collector.add(await waited_for(_first_of(batches), receive))
    except BaseException:
        await batches.aclose()
        raise

    async def events() -> AsyncGenerator[bytes, None]:
        starts = map(shape.start, range(len(collector.choices))) if shape.start is not None else ()
        yield b"".join(map(_sse, starts)) + _events(shape, first)
        try:
            async for batch in batches:
                yield _events(shape, collector.add(batch))
        except Exception as error:
            if not isinstance(error, KvcommonsError):
                logger.exception("a stream failed")
            yield _sse(failure(error)[1])
            return
        usage = b"" if shape.usage is None else _sse(shape.usage(collector.choices))
        yield usage + b"data: [DONE]\n\n"

    limit_s = timeout_s + READING_S
    return EventStream(events(), batches, headers(collector.choices), limit_s)


def _events(shape: Shape, news: list[tuple[int, str, Any, Any]]) -> bytes:
    return b"".join(
        _sse(shape.event(index, text, reason, logprobs)) for index, text, reason, logprobs in news
    )


def _sse(body: Event) -> bytes:
    return b"data: " + encode(body) + b"\n\n"
