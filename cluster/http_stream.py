"""From chunks to an HTTP answer: all at once, or as server-sent events.

It prevents two failures of streaming over HTTP: an error that gets status 200 because the headers
had gone out before the first token was sure, and a client that goes away while its request runs on.

(A module of its own: `serve.ingress` copies the routes while `cluster.app` is still being read.)
"""

import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from actors.dispatch import RoutedChunk
from cluster import openai_api
from cluster.openai_api import Choice
from shared_cache.errors import KvcommonsError

logger = logging.getLogger(__name__)

Chunks = AsyncGenerator[tuple[int, RoutedChunk], None]
Event = dict[str, Any]


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, its source is closed, which aborts the request."""

    def __init__(self, events: AsyncGenerator[str, None], source: Chunks) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._to_close = (events, source)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._to_close:
                await generator.aclose()


async def collect(chunks: Chunks, num_choices: int) -> list[Choice]:
    """All choices, when they are complete."""
    choices = [Choice() for _ in range(num_choices)]
    async with aclosing(chunks):
        async for index, routed in chunks:
            choices[index].add(routed)
    return choices


async def event_stream(
    chunks: Chunks,
    num_choices: int,
    first_events: list[Event],
    event: Callable[[int, RoutedChunk], Event],
    usage: Callable[[list[Choice]], Event] | None,
) -> EventStream:
    """The response, once the first chunk is there: errors before it still get their status."""
    choices = [Choice() for _ in range(num_choices)]
    first = await anext(chunks)

    async def events() -> AsyncGenerator[str, None]:
        for one in first_events:
            yield _sse(one)
        try:
            async for index, routed in _chained(first, chunks):
                choices[index].add(routed)
                yield _sse(event(index, routed))
        except KvcommonsError as error:
            yield _sse(openai_api.failure(error)[1])
            return
        except Exception as error:
            logger.exception("a stream failed")
            yield _sse(openai_api.failure(error)[1])
            return
        if usage is not None:
            yield _sse(usage(choices))
        yield "data: [DONE]\n\n"

    return EventStream(events(), chunks)


async def _chained(first: tuple[int, RoutedChunk], rest: Chunks) -> Chunks:
    yield first
    async for item in rest:
        yield item


def _sse(body: Event) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
