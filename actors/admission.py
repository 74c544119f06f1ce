"""From a request's arrival to its first token: its prefix is staged before the engine hears of it.

Prevents three ways to lose what a cache is for: a request whose blocks are all here waits behind
those that wait for a store; the deadline of a request runs only once a thread is free for it; and
requests that are far from their turn keep the whole host tier leased, so that nothing can be
staged or saved for those whose turn it is.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial

from actors.engine import Engine, GenerationRequest, Receipt, TokenChunk
from shared_cache.hashing import BlockHash, block_hashes
from shared_cache.staging import SharedCache, StagedPrefix

STAGED_BATCHES = 2
"""Requests that may be in the engine without a first token, in engine batches: one that runs its
prefill, and one that is ready to follow."""

MAX_FETCHING = 16
"""Requests that may wait for the shared tier at the same time, a thread for each."""


class StagingQueue:
    """Requests on their way into one engine; for one event loop.

    Two queues, each first come, first served: for the shared tier, which only those stand in that
    lack something, and for the engine. Who stands in one has nothing leased yet, or is at its head.
    """

    def __init__(self, name: str, max_batch_size: int) -> None:
        self._fetching = asyncio.Semaphore(MAX_FETCHING)
        self._places = asyncio.Semaphore(STAGED_BATCHES * max_batch_size)
        self._threads = ThreadPoolExecutor(MAX_FETCHING, f"{name}-stage")

    async def stream(
        self, engine: Engine, request: GenerationRequest
    ) -> AsyncGenerator[TokenChunk, None]:
        """What the engine gives, its receipt split by tier; stages first, once there is a place.

        The place is kept, and the blocks stay leased, until the first token.
        """
        async with aclosing(engine.generate(request)) as stream:
            if engine.cache is not None:
                first = await self._first_chunk(engine, engine.cache, request, stream)
                if first is not None:
                    yield first
            async for chunk in stream:
                yield chunk

    def close(self) -> None:
        """Stage nothing more."""
        self._threads.shutdown(wait=False)

    async def _first_chunk(
        self,
        engine: Engine,
        cache: SharedCache,
        request: GenerationRequest,
        stream: AsyncGenerator[TokenChunk, None],
    ) -> TokenChunk | None:
        hashes = _reusable_hashes(engine, request)
        async with AsyncExitStack() as held:
            if _lacks_something(engine, cache, hashes):
                async with self._fetching:
                    staged = await self._stage(engine, cache, hashes)
                    held.callback(cache.release, staged)
                    await held.enter_async_context(self._places)
            else:
                await held.enter_async_context(self._places)
                staged = await self._stage(engine, cache, hashes)
                held.callback(cache.release, staged)
            chunk = await anext(stream, None)  # loads are done by then
        if chunk is None or chunk.receipt is None:
            return chunk
        block = engine.namespace.layout.tokens_per_block
        return replace(chunk, receipt=_with_tiers(chunk.receipt, staged, block))

    async def _stage(
        self, engine: Engine, cache: SharedCache, hashes: Sequence[BlockHash]
    ) -> StagedPrefix:
        """Lease what may be loaded; what the device has is left out.

        The deadline runs from here, whenever a thread is free.
        """
        until_s = time.monotonic() + cache.deadline_s
        staged = cache.lease(hashes, engine.num_device_blocks(hashes))
        if not cache.can_fetch(hashes, staged.end):
            return staged
        growing = self._threads.submit(_grow, cache, staged, hashes, until_s)
        try:
            return await asyncio.wrap_future(growing)
        except BaseException:
            growing.add_done_callback(partial(_release_late, cache, staged))
            raise


def _reusable_hashes(engine: Engine, request: GenerationRequest) -> Sequence[BlockHash]:
    """The blocks that may be loaded: whole ones, leaving a token to compute."""
    tokens, block = request.prompt_token_ids, engine.namespace.layout.tokens_per_block
    num_blocks = (len(tokens) - 1) // block
    if num_blocks < 1 or len(tokens) > engine.max_total_tokens:
        return ()
    return block_hashes(tokens[: num_blocks * block], block, request.scope)


def _lacks_something(engine: Engine, cache: SharedCache, hashes: Sequence[BlockHash]) -> bool:
    """Whether blocks that are neither on the device nor in host memory could be fetched."""
    first = engine.num_device_blocks(hashes)
    return cache.can_fetch(hashes, first + cache.host.match(hashes[first:]))


def _grow(
    cache: SharedCache, staged: StagedPrefix, hashes: Sequence[BlockHash], until_s: float
) -> StagedPrefix:
    return cache.grow(staged, hashes, max(0.0, until_s - time.monotonic()))


def _release_late(
    cache: SharedCache, staged: StagedPrefix, growing: "Future[StagedPrefix]"
) -> None:
    """Give back what was leased for a request that has gone meanwhile."""
    cache.release(staged)
    if not growing.cancelled() and growing.exception() is None:
        cache.release(growing.result())


def _with_tiers(receipt: Receipt, staged: StagedPrefix, tokens_per_block: int) -> Receipt:
    """The receipt with the engine's `host` split into what was in host memory and what came."""
    first, count = receipt.device // tokens_per_block, receipt.host // tokens_per_block
    num_fetched = len(staged.fetched.intersection(range(first, first + count)))
    shared = num_fetched * tokens_per_block
    return replace(receipt, host=receipt.host - shared, shared=shared)
