"""From a request's arrival to its first token: its prefix is staged before the engine hears of it.

Prevents four ways to lose what a cache is for: a request whose blocks are all here waits behind
those that wait for a store; the deadline of a request runs only once its turn has come; requests
that are far from their turn keep the whole host tier leased, so that nothing can be staged or saved
for those whose turn it is; a question to the owner of the node's memory holds up the event loop.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial

from actors.engine import Engine, GenerationRequest, Receipt, TokenChunk
from shared_cache.hashing import BlockHash, ReuseScope, block_hashes
from shared_cache.host.interface import HostLease
from shared_cache.prefix_cache import PrefixCache, StagedPrefix

STAGED_BATCHES = 2
"""Requests that may be in the engine without a first token, in engine batches: one that runs its
prefill, and one that is ready to follow."""

MAX_FETCHING = 16
"""Requests that may wait for the tiers at the same time, a thread for each."""

LOOK_UP_THREADS = 4
"""Threads that ask the host tier what it has: their own, as those that fetch may all be taken."""

LOOK_UP_TIMEOUT_S = 1.0
"""A host tier that does not answer within this has nothing for a request."""

NOTHING = StagedPrefix(HostLease(-1, ()))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The blocks of one request that may be loaded, and until when it waits for them.

    `own_hashes` are those in the request's own scope, `hashes` those under which they are stored,
    in `scope`.
    """

    engine: Engine
    cache: PrefixCache
    own_hashes: Sequence[BlockHash]
    hashes: Sequence[BlockHash]
    scope: ReuseScope
    until_s: float

    def lease(self) -> StagedPrefix:
        """What is here of it now, the device's blocks left out."""
        first = self.engine.num_device_blocks(self.own_hashes)
        return self.cache.lease(self.hashes, first, self.scope)

    def grown(self, staged: StagedPrefix) -> StagedPrefix:
        """`staged`, and what arrives in time of the rest."""
        return self.cache.grow(staged, self.hashes, max(0.0, self.until_s - time.monotonic()))

    def lacks_something(self, staged: StagedPrefix) -> bool:
        """Whether more than `staged` could come from a tier."""
        return self.cache.can_fetch(self.hashes, staged.end)


class StagingQueue:
    """Requests on their way into one engine; for one event loop.

    Two queues, each first come, first served: for the tiers, which only those stand in that lack
    something, and for the engine. Who stands in one has nothing leased yet, or is at its head.
    A request's deadline runs from its arrival: who still stands in the first queue then goes on
    with what is here.
    """

    def __init__(self, name: str, max_batch_size: int) -> None:
        self._fetching = asyncio.Semaphore(MAX_FETCHING)
        self._places = asyncio.Semaphore(STAGED_BATCHES * max_batch_size)
        self._fetchers = ThreadPoolExecutor(MAX_FETCHING, f"{name}-stage")
        self._look_ups = ThreadPoolExecutor(LOOK_UP_THREADS, f"{name}-look-up")

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
        self._fetchers.shutdown(wait=False)
        self._look_ups.shutdown(wait=False)

    async def _first_chunk(
        self,
        engine: Engine,
        cache: PrefixCache,
        request: GenerationRequest,
        stream: AsyncGenerator[TokenChunk, None],
    ) -> TokenChunk | None:
        wanted = _wanted(engine, cache, request)
        async with AsyncExitStack() as held:
            if wanted is not None:
                staged = await self._staged(wanted, held)
            else:
                staged = NOTHING
                await held.enter_async_context(self._places)
            chunk = await anext(stream, None)  # loads are done by then
        if chunk is None or chunk.receipt is None:
            return chunk
        block = engine.namespace.layout.tokens_per_block
        return replace(chunk, receipt=_with_tiers(chunk.receipt, staged, block))

    async def _staged(self, wanted: _Wanted, held: AsyncExitStack) -> StagedPrefix:
        """What could be staged of it, with a place in the engine; `held` gives both back."""
        staged = await self._leased(wanted, held)
        if wanted.lacks_something(staged):
            late = wanted.until_s
            fetching = await self._at_head(self._fetching, wanted, staged, held, late)
            if fetching is not None:
                try:
                    staged = await self._grown(wanted, fetching, held)
                finally:
                    self._fetching.release()
            else:
                wanted.cache.miss_deadline()
                staged = await self._leased(wanted, held)
        ready = await self._at_head(self._places, wanted, staged, held) or NOTHING
        held.callback(self._places.release)
        return replace(ready, fetched=staged.fetched)

    async def _at_head(
        self,
        queue: asyncio.Semaphore,
        wanted: _Wanted,
        staged: StagedPrefix,
        held: AsyncExitStack,
        until_s: float = math.inf,
    ) -> StagedPrefix | None:
        """What is here once it is this request's turn; nothing is leased while it waits for it.

        The caller gives its turn back (`queue.release`); None when time ran out before it came.
        """
        if not queue.locked():
            await queue.acquire()
            return staged
        wanted.cache.release(staged)
        if not await _acquired(queue, until_s):
            return None
        try:
            return await self._leased(wanted, held)
        except BaseException:
            queue.release()
            raise

    async def _leased(self, wanted: _Wanted, held: AsyncExitStack) -> StagedPrefix:
        """What the host tier has of it; nothing when it takes too long to say so."""
        looking = self._look_ups.submit(wanted.lease)
        staged = await _result(looking, wanted.cache, LOOK_UP_TIMEOUT_S)
        held.callback(wanted.cache.release, staged)
        return staged

    async def _grown(
        self, wanted: _Wanted, staged: StagedPrefix, held: AsyncExitStack
    ) -> StagedPrefix:
        """`staged`, and what arrives in time of the rest."""
        growing = self._fetchers.submit(wanted.grown, staged)
        grown = await _result(growing, wanted.cache, None)
        held.callback(wanted.cache.release, grown)
        return grown


def _wanted(engine: Engine, cache: PrefixCache, request: GenerationRequest) -> _Wanted | None:
    """The blocks that may be loaded, if any: whole ones, leaving a token to compute."""
    tokens, block = request.prompt_token_ids, engine.namespace.layout.tokens_per_block
    num_blocks = (len(tokens) - 1) // block
    if num_blocks < 1 or len(tokens) > engine.max_total_tokens:
        return None
    reusable, scope = tokens[: num_blocks * block], engine.storage_scope(request.scope)
    own = hashes = block_hashes(reusable, block, request.scope)
    if scope != request.scope:
        hashes = block_hashes(reusable, block, scope)
    return _Wanted(engine, cache, own, hashes, scope, time.monotonic() + cache.deadline_s)


async def _acquired(queue: asyncio.Semaphore, until_s: float) -> bool:
    """Stand in a queue until `until_s`; False when it was never this task's turn."""
    left_s = None if until_s == math.inf else max(0.0, until_s - time.monotonic())
    acquiring = asyncio.ensure_future(queue.acquire())
    try:
        done, _ = await asyncio.wait({acquiring}, timeout=left_s)
        return bool(done)
    except BaseException:
        if acquiring.done() and not acquiring.cancelled():
            queue.release()
        raise
    finally:
        acquiring.cancel()


async def _result(
    running: "Future[StagedPrefix]", cache: PrefixCache, timeout_s: float | None
) -> StagedPrefix:
    """What `running` gives, or nothing when time runs out; what comes too late is given back."""
    result = asyncio.wrap_future(running)
    is_taken = False
    try:
        await asyncio.wait({result}, timeout=timeout_s)
        is_taken = result.done()
        return result.result() if is_taken else NOTHING
    finally:
        if not (is_taken or running.cancel()):
            running.add_done_callback(partial(_release_late, cache))


def _release_late(cache: PrefixCache, running: "Future[StagedPrefix]") -> None:
    """Give back what was leased for a request that has gone meanwhile, or goes on without."""
    if not running.cancelled() and running.exception() is None:
        cache.release(running.result())


def _with_tiers(receipt: Receipt, staged: StagedPrefix, tokens_per_block: int) -> Receipt:
    """The receipt with the engine's `host` split into what was in host memory and what came."""
    first, count = receipt.device // tokens_per_block, receipt.host // tokens_per_block
    num_fetched = len(staged.fetched.intersection(range(first, first + count)))
    shared = num_fetched * tokens_per_block
    return replace(receipt, host=receipt.host - shared, shared=shared)
