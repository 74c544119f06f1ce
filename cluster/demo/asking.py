"""One request as its caller sees it: the clock starts when it is sent.

Every time in the demo is taken here, at the caller, so it includes routing, queueing, staging and
the way back, and no replica can flatter itself.
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from actors.dispatch import RoutedChunk
from actors.engine import GenerationRequest, Receipt, TokenChunk


class Asks(Protocol):
    """What the demo needs of a `Dispatcher`."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RoutedChunk, None]:
        """See `Dispatcher.generate`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `ttft_s` and `total_s` are seconds from sending to first and last token."""

    text: str
    token_ids: tuple[int, ...]
    receipt: Receipt
    ttft_s: float
    total_s: float
    num_accepted: int
    num_failovers: int
    replica_id: str

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, from sending to the last one."""
        return len(self.token_ids) / self.total_s


def ignore_chunk(chunk: TokenChunk) -> None:
    """For callers that only want the whole answer."""


async def ask(
    dispatcher: Asks,
    request: GenerationRequest,
    on_chunk: Callable[[TokenChunk], None] = ignore_chunk,
) -> Answer:
    """Send `request`, call `on_chunk` with what streams in, give the whole answer."""
    started_s = time.perf_counter()
    arrivals_s: list[float] = []
    routed: list[RoutedChunk] = []
    async with aclosing(dispatcher.generate(request)) as stream:
        async for item in stream:
            if item.chunk.token_ids:
                arrivals_s.append(time.perf_counter() - started_s)
            routed.append(item)
            on_chunk(item.chunk)
    chunks = [item.chunk for item in routed]
    return Answer(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        receipt=_receipt(chunks),
        ttft_s=arrivals_s[0],
        total_s=arrivals_s[-1],
        num_accepted=sum(chunk.num_accepted for chunk in chunks),
        num_failovers=routed[-1].num_failovers,
        replica_id=routed[-1].replica_id,
    )


def _receipt(chunks: Sequence[TokenChunk]) -> Receipt:
    return next(chunk.receipt for chunk in chunks if chunk.receipt is not None)
