"""One engine as a service: staged admission, streaming, health, statistics, drain.

It prevents the two failures that an engine cannot: a store that fails in the middle of a step (the
prefix is staged here, before the engine hears of the request) and a process that still answers
while its engine does not (health looks at the step loop, not at the process). Ray wraps this class.
"""

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Literal, TypeVar

from actors.admission import StagingQueue
from actors.cache_changes import CacheTier, Cursor, TierChanges
from actors.cache_reports import CacheReports
from actors.config import ReplicaConfig
from actors.engine import Engine, GenerationRequest, TokenChunk
from actors.replica_health import ProgressWatch, ReplicaHealth, ReplicaState, ReplicaStats
from actors.request_log import RequestLog
from actors.wire.server import Address, WireServer
from shared_cache.errors import (
    KvcommonsError,
    ReplicaBusyError,
    ReplicaRefusedError,
    ReplicaUnavailableError,
)

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FLUSH_RESERVE_S = 5.0
"""Of the time for draining, what is kept for writing saves, at most a quarter."""


class EngineReplica:
    """One replica. The engine is built in the background; requests are refused until it is there.

    `build` makes the engine (default: what the configuration names). `stall_timeout_s` is the
    longest that one turn may take before the replica calls itself stalled, `machine` names the
    machine that it runs on. Streams belong to one event loop; all other calls may come from another
    one, so that no stream can hold them up.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        build: Callable[[ReplicaConfig], Engine] | None = None,
        stall_timeout_s: float = 120.0,
        machine: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = config.name
        self._boot_id = uuid.uuid4().hex[:12]
        self._clock = clock
        self._started_s = clock()
        self._stall_timeout_s = stall_timeout_s
        self._progress = ProgressWatch()
        self._state: Literal["open", "draining", "closed"] = "open"
        self._max_outstanding = config.engine.max_outstanding
        self._num_outstanding = 0
        self._idle = threading.Event()
        self._idle.set()
        self._staging = StagingQueue(config.name, config.engine.max_batch_size)
        self._wire: WireServer | None = None
        self._threads = ThreadPoolExecutor(1, f"{config.name}-build")
        config = _within_machine(config)
        self._uses_arena = config.cache is not None and config.cache.host.scope == "node"
        self._machine = machine if self._uses_arena else None
        self._reports: CacheReports | None = None
        self._engine: Future[Engine] = self._threads.submit(build or _build_engine, config)

    async def ready(self) -> ReplicaHealth:
        """The health once the engine is built; raises what building it raised."""
        await asyncio.wrap_future(self._engine)
        return self.health()

    def health(self) -> ReplicaHealth:
        """Whether this replica can serve; looks at the engine's step loop; cheap."""
        state, reason = self._check()
        health = ReplicaHealth(
            self._name, self._boot_id, os.getpid(), state, reason, machine=self._machine
        )
        engine = self._built()
        if engine is None:
            return health
        pool = engine.stats().kv_cache
        return replace(
            health,
            device_tokens=pool.max_num_blocks * pool.tokens_per_block,
            max_total_tokens=engine.max_total_tokens,
        )

    async def stats(self) -> ReplicaStats:
        """A snapshot of the replica, its engine and its part of the cache."""
        engine = self._built()
        cache = engine.cache if engine else None
        return ReplicaStats(
            health=self.health(),
            uptime_s=self._clock() - self._started_s,
            num_outstanding=self._num_outstanding,
            engine=engine.stats() if engine else None,
            cache=await asyncio.to_thread(cache.stats) if cache else None,
        )

    async def ask(self, question: Callable[[Engine], Answer]) -> Answer:
        """What `question` finds out about the engine, in a thread: for administration.

        Raises `ReplicaRefusedError` while there is no engine that runs, and what it raises.
        """
        engine = self._built()
        if engine is None or not engine.is_alive():
            state, reason = self._check()
            raise ReplicaRefusedError(f"{self._name} is {state} {reason}".rstrip())
        return await asyncio.to_thread(question, engine)

    async def traces(self, question: Callable[[RequestLog], Answer]) -> Answer:
        """What `question` finds in the log of the last requests; it may not wait."""
        return question(self._staging.log)

    async def cache_changes(self, read: Mapping[CacheTier, Cursor]) -> tuple[TierChanges, ...]:
        """What the replica's own memory got and lost behind what was `read`, for the router."""
        engine = self._built()
        if engine is None or not engine.is_alive():
            return ()
        reports = self._reports_of(engine)
        return await asyncio.to_thread(reports.since, engine.take_cache_changes, read)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stage the prefix, then stream the continuation; closing this aborts the request.

        Raises `RequestError` when the engine can never serve it, `ReplicaUnavailableError` when
        this replica cannot now, then the request may go on elsewhere: `ReplicaBusyError` when it
        only has no room, `ReplicaRefusedError` when it takes no requests.
        """
        self._num_outstanding += 1
        self._idle.clear()  # before looking at the state: `drain` sees this request, or it is seen
        try:
            engine = self._admit()
            async with aclosing(self._staging.stream(engine, request)) as stream:
                async for chunk in stream:
                    yield chunk
        except Exception as error:
            if isinstance(error, KvcommonsError) or engine.is_alive():  # ours, or a bug
                raise
            raise ReplicaUnavailableError(f"{self._name}: its engine ended: {error!r}") from error
        finally:
            self._num_outstanding -= 1
            if not self._num_outstanding:
                self._idle.set()

    async def listen(self, host: str) -> Address:
        """Where another process reaches `generate`: a socket on this address of the machine.

        Streams run on the event loop of the first call.
        """
        if self._wire is None:
            self._wire = WireServer(self.generate)
        return await self._wire.listen(host)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, wait for the running ones, write what is queued for the store.

        False when time ran out with requests still running or blocks still unwritten; requests
        that do not end leave some time for the blocks.
        """
        if self._state == "open":
            self._state = "draining"
        deadline_s = time.monotonic() + timeout_s
        reserve_s = min(FLUSH_RESERVE_S, timeout_s / 4)
        is_idle = await asyncio.to_thread(self._idle.wait, timeout_s - reserve_s)
        await self._save_rest()
        is_written = await self.flush(max(reserve_s, deadline_s - time.monotonic()))
        return is_idle and is_written

    async def flush(self, timeout_s: float) -> bool:
        """Wait until all saved blocks are in the shared tier; False when time ran out."""
        engine = self._built()
        return engine is None or await asyncio.to_thread(engine.flush, timeout_s)

    async def close(self) -> None:
        """Abort what runs and free the engine; a second close is a no-op."""
        if self._state == "closed":
            return
        self._state = "closed"
        await asyncio.wait([asyncio.wrap_future(self._engine)])
        engine = self._built()
        try:
            if engine is not None:
                await asyncio.to_thread(engine.close)
        finally:
            if self._wire is not None:
                self._wire.close()
            self._threads.shutdown(wait=False)
            self._staging.close()

    async def _save_rest(self) -> None:
        """Have written what lies in host memory of the last requests and is stored nowhere.

        Looking it up is enough: the host tier then names what the shared tier lacks.
        """
        engine = self._built()
        if engine is None or engine.cache is None:
            return
        cache = engine.cache
        for trace in self._staging.log.recent(cache.num_blocks):
            staged = await asyncio.to_thread(cache.lease, trace.hashes, 0, trace.scope)
            cache.release(staged)

    def _built(self) -> Engine | None:
        done = self._engine.done() and not self._engine.cancelled()
        return self._engine.result() if done and self._engine.exception() is None else None

    def _reports_of(self, engine: Engine) -> CacheReports:
        if self._reports is None:
            is_own = engine.cache is not None and not self._uses_arena
            own_blocks = engine.cache.num_blocks if engine.cache and is_own else 0
            self._reports = CacheReports(self._boot_id, own_blocks)
        return self._reports

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
            raise ReplicaRefusedError(f"{self._name} is {state} {reason}".rstrip())
        if self._num_outstanding > self._max_outstanding:  # this one counts
            raise ReplicaBusyError(
                f"{self._name} has {self._max_outstanding} requests, as many as it takes; send "
                "the request again later, or raise engine.max_waiting_requests"
            )
        return engine


def _build_engine(config: ReplicaConfig) -> Engine:
    from actors.engines import build_engine  # here: it brings torch, which callers do not need

    return build_engine(config)


def _within_machine(config: ReplicaConfig) -> ReplicaConfig:
    """The configuration with no more engine threads than this machine has CPUs for this process.

    Whoever starts replicas on several machines knows only all CPUs together.
    """
    threads, num_cpus = config.engine.torch_threads, _num_cpus()
    if threads is None or threads <= num_cpus:
        return config
    logger.info("%s: %d threads instead of %d, one per CPU", config.name, num_cpus, threads)
    engine = config.engine.model_copy(update={"torch_threads": num_cpus})
    return config.model_copy(update={"engine": engine})


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
