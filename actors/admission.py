"""From a request's arrival to its first token: its prefix is staged before the engine hears of it.

Prevents four ways to lose what a cache is for: a request whose blocks are all here waits behind
those that wait for a store; the deadline of a request runs only once its turn has come; requests
that are far from their turn keep the whole host tier leased, so that nothing can be staged or saved
for those whose turn it is; a question to the owner of the node's memory holds up the event loop.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial

from actors.engine import Engine, GenerationRequest, Receipt, TokenChunk
from actors.preloading import Parts, Preloading
from actors.request_log import Missed, RequestLog, RequestTrace, now_s
from actors.wanted import NOTHING, WantedPrefix, wanted_prefix, with_tiers
from shared_cache.host.interface import HostLease
from shared_cache.prefix_cache import PrefixCache, StagedPrefix

STAGED_BATCHES = 2
"""Requests that may be in the engine without a first token, in engine batches: one that runs its
prefill, and one that is ready to follow."""

MAX_FETCHING = 16
"""Requests that may wait for the tiers at the same time, a thread for each."""

PART_THREADS = 4
"""Threads that wait for a prompt's first blocks, to load them ahead; who finds none does not."""

LOOK_UP_THREADS = 4
"""Threads that ask the host tier what it has: their own, as those that fetch may all be taken."""

LOOK_UP_TIMEOUT_S = 1.0
"""A host tier that does not answer within this has nothing for a request."""

AWAY = StagedPrefix(HostLease(-1, ()))
"""Nothing, as the host tier took too long."""


class StagingQueue:
    """Requests on their way into one engine; for one event loop.

    Two queues, each first come, first served: for the tiers, which only those stand in that lack
    something, and for the engine. Who stands in one has nothing leased yet, or is at its head.
    A request's deadline runs from its arrival: who still stands in the first queue then goes on
    with what is here.
    """

    def __init__(self, name: str, max_batch_size: int) -> None:
        self.log = RequestLog()
        self._name = name
        self._fetching = asyncio.Semaphore(MAX_FETCHING)
        self._places = asyncio.Semaphore(STAGED_BATCHES * max_batch_size)
        self._fetchers = ThreadPoolExecutor(MAX_FETCHING, f"{name}-stage")
        self._parts = ThreadPoolExecutor(PART_THREADS, f"{name}-stage-ahead")
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
        self._parts.shutdown(wait=False)
        self._look_ups.shutdown(wait=False)

    async def _first_chunk(
        self,
        engine: Engine,
        cache: PrefixCache,
        request: GenerationRequest,
        stream: AsyncGenerator[TokenChunk, None],
    ) -> TokenChunk | None:
        wanted, missed = wanted_prefix(engine, cache, request), None
        block = engine.namespace.layout.tokens_per_block
        ahead = Preloading(cache, request, block)
        async with AsyncExitStack() as held:
            held.push_async_callback(ahead.stop)
            if wanted is not None:
                staged, missed = await self._staged(wanted, held, ahead)
            else:
                staged = NOTHING
                await held.enter_async_context(self._places)
            chunk = await anext(stream, None)  # loads are done by then
        if chunk is None or chunk.receipt is None:
            return chunk
        receipt = with_tiers(chunk.receipt, staged.fetched, ahead.loaded, block)
        if wanted is not None:
            self._note(request.request_id, wanted, staged, missed, receipt)
        return replace(chunk, receipt=receipt)

    def _note(
        self,
        request_id: str,
        wanted: WantedPrefix,
        staged: StagedPrefix,
        missed: Missed | None,
        receipt: Receipt,
    ) -> None:
        trace = RequestTrace(
            request_id=request_id,
            replica=self._name,
            namespace=wanted.engine.namespace.fingerprint,
            at_s=now_s(),
            tokens_per_block=wanted.engine.namespace.layout.tokens_per_block,
            hashes=wanted.hashes,
            receipt=receipt,
            first=staged.first,
            staged=staged.end,
            missed=missed,
            fate=staged.fate,
            scope=wanted.scope,
        )
        self.log.add(trace)

    async def _staged(
        self, wanted: WantedPrefix, held: AsyncExitStack, ahead: Preloading
    ) -> tuple[StagedPrefix, Missed | None]:
        """What could be staged of it, and why no more; `held` gives it and a place back."""
        staged = await self._leased(wanted, held)
        missed: Missed | None = "host_tier_away" if staged is AWAY else None
        if wanted.lacks_something(staged):
            late = wanted.until_s
            fetching = await self._at_head(self._fetching, wanted, staged, held, late)
            if fetching is not None:
                self._load_ahead(wanted, fetching, ahead)
                try:
                    staged = await self._grown(wanted, fetching, held)
                finally:
                    self._fetching.release()
                    ahead.enough()
                missed = staged.missed
            else:
                wanted.cache.miss_deadline()
                staged = await self._leased(wanted, held)
                missed = "no_turn"
        elif staged.end < len(wanted.hashes) and missed is None:
            missed = "not_asked"
        ready = await self._at_head(self._places, wanted, staged, held) or NOTHING
        held.callback(self._places.release)
        return replace(ready, fetched=staged.fetched, fate=staged.fate), missed

    def _load_ahead(self, wanted: WantedPrefix, here: StagedPrefix, ahead: Preloading) -> None:
        """Have blocks behind `here` loaded as they come, if the engine can, and has a place."""
        preload = wanted.engine.preload
        if preload is None or self._places.locked():
            return

        async def staging(end: int) -> StagedPrefix | None:
            growing = self._parts.submit(wanted.grown_to, here.end, end)
            return await _result(growing, wanted.cache, None)

        block_bytes = wanted.engine.namespace.layout.block_bytes
        ahead.start(preload, Parts(here.end, len(wanted.hashes), block_bytes), staging)

    async def _at_head(
        self,
        queue: asyncio.Semaphore,
        wanted: WantedPrefix,
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

    async def _leased(self, wanted: WantedPrefix, held: AsyncExitStack) -> StagedPrefix:
        """What the host tier has of it; nothing when it takes too long to say so."""
        looking = self._look_ups.submit(wanted.lease)
        staged = await _result(looking, wanted.cache, LOOK_UP_TIMEOUT_S) or AWAY
        held.callback(wanted.cache.release, staged)
        return staged

    async def _grown(
        self, wanted: WantedPrefix, staged: StagedPrefix, held: AsyncExitStack
    ) -> StagedPrefix:
        """`staged`, and what arrives in time of the rest."""
        growing = self._fetchers.submit(wanted.grown, staged)
        grown = await _result(growing, wanted.cache, None) or NOTHING
        held.callback(wanted.cache.release, grown)
        return grown


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
) -> StagedPrefix | None:
    """What `running` gives, or None when time runs out; what comes too late is given back."""
    result = asyncio.wrap_future(running)
    is_taken = False
    try:
        await asyncio.wait({result}, timeout=timeout_s)
        is_taken = result.done()
        return result.result() if is_taken else None
    finally:
        if not (is_taken or running.cancel()):
            running.add_done_callback(partial(_release_late, cache))


def _release_late(cache: PrefixCache, running: "Future[StagedPrefix]") -> None:
    """Give back what was leased for a request that has gone meanwhile, or goes on without."""
    if not running.cancelled() and running.exception() is None:
        cache.release(running.result())
