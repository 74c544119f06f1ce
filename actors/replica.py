"""One engine as a service: staged admission, streaming, health, statistics, drain.

It prevents the two failures that an engine cannot: a store that fails in the middle of a step (the
prefix is staged here, before the engine hears of the request) and a process that still answers
while its engine does not (health looks at the step loop, not at the process). Ray wraps this class.
"""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal

from actors.config import ReplicaConfig
from actors.engine import Engine, EngineStats, GenerationRequest, Receipt, TokenChunk
from actors.streams import batches
from shared_cache.errors import KvcommonsError, ReplicaUnavailableError
from shared_cache.hashing import block_hashes
from shared_cache.staging import CacheStats, SharedCache, StagedPrefix

ReplicaState = Literal["starting", "ready", "draining", "closed", "failed", "stalled"]
"""`failed`: the engine could not be built or its loop ended; `stalled`: its loop does not move."""

STAGING_THREADS = 16


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """What a watcher has to know of one replica; only `ready` ones get requests.

    `boot_id` is new in every process. `cache_blocks` is how many blocks the device pool or the
    host tier can hold, whichever is larger; 0 until `ready`, as is `max_total_tokens`.
    """

    name: str
    boot_id: str
    pid: int
    state: ReplicaState
    reason: str = ""
    cache_blocks: int = 0
    max_total_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A snapshot of one replica; `engine` and `cache` are None until it is ready."""

    health: ReplicaHealth
    uptime_s: float
    num_outstanding: int
    engine: EngineStats | None
    cache: CacheStats | None


class ProgressWatch:
    """Tells since when an engine that has work has not moved."""

    def __init__(self) -> None:
        self._turns = -1
        self._since_s = 0.0

    def stalled_s(self, now_s: float, stats: EngineStats) -> float:
        """Seconds without a turn although requests wait or run; mutates."""
        is_idle = stats.num_running + stats.num_waiting == 0
        if is_idle or stats.num_turns != self._turns:
            self._turns, self._since_s = stats.num_turns, now_s
        return now_s - self._since_s


class EngineReplica:
    """One replica. The engine is built in the background; requests are refused until it is there.

    `build` makes the engine (default: what the configuration names). `stall_timeout_s` is the
    longest that one turn may take before the replica calls itself stalled.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        build: Callable[[ReplicaConfig], Engine] | None = None,
        stall_timeout_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = config.name
        self._boot_id = uuid.uuid4().hex[:12]
        self._clock = clock
        self._started_s = clock()
        self._stall_timeout_s = stall_timeout_s
        self._progress = ProgressWatch()
        self._state: Literal["open", "draining", "closed"] = "open"
        self._num_outstanding = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = ThreadPoolExecutor(STAGING_THREADS, f"{config.name}-stage")
        self._engine: Future[Engine] = self._threads.submit(build or _build_engine, config)

    async def ready(self) -> ReplicaHealth:
        """The health once the engine is built; raises what building it raised."""
        await asyncio.wrap_future(self._engine)
        return self.health()

    def health(self) -> ReplicaHealth:
        """Whether this replica can serve; looks at the engine's step loop; cheap."""
        state, reason = self._check()
        health = ReplicaHealth(self._name, self._boot_id, os.getpid(), state, reason)
        engine = self._built()
        if engine is None:
            return health
        host_slots = engine.cache.host.stats().num_slots if engine.cache else 0
        return replace(
            health,
            cache_blocks=max(engine.stats().kv_cache.max_num_blocks, host_slots),
            max_total_tokens=engine.max_total_tokens,
        )

    def stats(self) -> ReplicaStats:
        """A snapshot of the replica, its engine and its part of the cache."""
        engine = self._built()
        return ReplicaStats(
            health=self.health(),
            uptime_s=self._clock() - self._started_s,
            num_outstanding=self._num_outstanding,
            engine=engine.stats() if engine else None,
            cache=engine.cache.stats() if engine and engine.cache else None,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stage the prefix, then stream the continuation; closing this aborts the request.

        Raises `RequestError` when the engine can never serve it, `ReplicaUnavailableError` when
        this replica cannot now; then the request may go on elsewhere.
        """
        engine = self._admit()
        self._num_outstanding += 1
        self._idle.clear()
        try:
            async with aclosing(self._staged_stream(engine, request)) as stream:
                async for chunk in stream:
                    yield chunk
        except Exception as error:
            if isinstance(error, KvcommonsError) or engine.is_alive():
                raise
            raise ReplicaUnavailableError(f"{self._name}: its engine ended: {error!r}") from error
        finally:
            self._num_outstanding -= 1
            if not self._num_outstanding:
                self._idle.set()

    async def stream(
        self, request: GenerationRequest
    ) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        """`generate` for another process: chunks that are ready together come together."""
        async with aclosing(batches(self.generate(request))) as groups:
            async for group in groups:
                yield group

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, wait for the running ones, write what is queued for the store.

        False when time ran out with requests still running or blocks still unwritten.
        """
        if self._state == "open":
            self._state = "draining"
        deadline_s = time.monotonic() + timeout_s
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return await self.flush(max(0.0, deadline_s - time.monotonic()))

    async def flush(self, timeout_s: float) -> bool:
        """Wait until all saved blocks are in the shared tier; False when time ran out."""
        engine = self._built()
        if engine is None or engine.cache is None:
            return True
        return await asyncio.to_thread(engine.cache.flush, timeout_s)

    async def close(self) -> None:
        """Abort what runs and free the engine; a second close is a no-op."""
        if self._state == "closed":
            return
        self._state = "closed"
        await asyncio.wait([asyncio.wrap_future(self._engine)])
        engine = self._built()
        if engine is not None:
            await asyncio.to_thread(engine.close)
        self._threads.shutdown(wait=False)

    def _built(self) -> Engine | None:
        done = self._engine.done() and not self._engine.cancelled()
        return self._engine.result() if done and self._engine.exception() is None else None

    def _check(self) -> tuple[ReplicaState, str]:
        if self._state == "closed":
            return "closed", ""
        if not self._engine.done():
            return "starting", ""
        error = self._engine.exception()
        if error is not None:
            return "failed", f"{type(error).__name__}: {error}"
        engine = self._engine.result()
        if not engine.is_alive():
            return "failed", "the engine's step loop has ended"
        stalled_s = self._progress.stalled_s(self._clock(), engine.stats())
        if stalled_s > self._stall_timeout_s:
            return "stalled", f"requests are waiting, but no turn for {stalled_s:.0f} s"
        return ("draining" if self._state == "draining" else "ready"), ""

    def _admit(self) -> Engine:
        engine = self._built()
        if engine is None or self._state != "open" or not engine.is_alive():
            state, reason = self._check()
            raise ReplicaUnavailableError(f"{self._name} is {state} {reason}".rstrip())
        return engine

    async def _staged_stream(
        self, engine: Engine, request: GenerationRequest
    ) -> AsyncGenerator[TokenChunk, None]:
        staged = await self._stage(engine, request)
        try:
            async with aclosing(engine.generate(request)) as stream:
                async for chunk in stream:
                    if chunk.receipt is not None:
                        chunk = self._with_tiers(engine, chunk, chunk.receipt, staged)
                        self._release(engine, staged)  # loads are done by now
                    yield chunk
        finally:
            self._release(engine, staged)

    async def _stage(self, engine: Engine, request: GenerationRequest) -> StagedPrefix | None:
        """Lease the blocks that may be loaded: whole ones, leaving a token to compute."""
        tokens, block = request.prompt_token_ids, engine.namespace.layout.tokens_per_block
        num_blocks = (len(tokens) - 1) // block
        cache = engine.cache
        if cache is None or num_blocks < 1 or len(tokens) > engine.max_total_tokens:
            return None
        hashes = block_hashes(tokens[: num_blocks * block], block, request.scope)
        staging = self._threads.submit(cache.stage, hashes)
        try:
            return await asyncio.wrap_future(staging)
        except asyncio.CancelledError:
            staging.add_done_callback(lambda late: _release_late(cache, late))
            raise

    def _release(self, engine: Engine, staged: StagedPrefix | None) -> None:
        """A second release is a no-op, so the end of a stream may release again."""
        if staged is not None and engine.cache is not None:
            engine.cache.release(staged)

    def _with_tiers(
        self, engine: Engine, chunk: TokenChunk, receipt: Receipt, staged: StagedPrefix | None
    ) -> TokenChunk:
        """The chunk with the engine's `host` split into what was in host memory and what came."""
        if staged is None:
            return chunk
        block = engine.namespace.layout.tokens_per_block
        first, count = receipt.device // block, receipt.host // block
        shared = block * len(staged.fetched.intersection(range(first, first + count)))
        return replace(chunk, receipt=replace(receipt, host=receipt.host - shared, shared=shared))


def _build_engine(config: ReplicaConfig) -> Engine:
    from actors.engines import build_engine  # here: it brings torch, which callers do not need

    return build_engine(config)


def _release_late(cache: SharedCache, staging: "Future[StagedPrefix]") -> None:
    """Give back a lease that arrived after its request had gone."""
    if not staging.cancelled() and staging.exception() is None:
        cache.release(staging.result())
