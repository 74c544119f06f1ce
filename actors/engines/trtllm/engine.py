"""The TensorRT-LLM engine: what a replica owns, around one `LLM`.

Never run on TensorRT-LLM: written from the sources of 1.2 and its neighbours, and tested with a
double of its API.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from actors.config import TrtllmMode
from actors.engine import CacheChanges, EngineStats, GenerationRequest, TokenChunk
from actors.engines.channel import Channel
from actors.engines.trtllm.api import TrtllmApi
from actors.engines.trtllm.loop import LoopThread
from actors.engines.trtllm.service import RequestService, ServedModel, SharedPart
from actors.engines.trtllm.watch import EngineWatch
from shared_cache.errors import KvcommonsError, ReplicaUnavailableError
from shared_cache.hashing import BlockHash, ReuseScope

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""Longest time for the first token of all: kernels are chosen and compiled with it."""

SHUTDOWN_TIMEOUT_S = 60.0
"""Longest wait for TensorRT-LLM's own shutdown."""

CHANGES_TIMEOUT_S = 5.0


class TrtllmEngine:
    """Implements `actors.engine.Engine` on one `LLM`, which it takes over, as it does `part`.

    `end` is called after the `LLM` has shut down: it returns when GPU memory is free, or raises.
    """

    preload = None

    def __init__(
        self,
        llm: Any,
        api: TrtllmApi,
        model: ServedModel,
        part: SharedPart,
        mode: TrtllmMode,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        self.namespace = part.namespace
        self.cache = part.cache
        self.tokenizer = model.tokenizer
        self._llm: Any = llm
        self._part = part
        self._mode = mode
        self._end = end
        self._is_closed = False
        self._service = service = RequestService(llm, api, model, mode, part)
        self._watch = EngineWatch(llm, service.statistics, service.events, service.probe)
        self._loop = LoopThread()
        self._loop.post(self._run_watch())

    @property
    def max_total_tokens(self) -> int:
        """See `Engine.max_total_tokens`."""
        return self._service.max_total_tokens

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `Engine.generate`."""
        prepared = self._service.prepare(request)
        if not self.is_alive():
            raise ReplicaUnavailableError(self._why_not())
        channel = Channel()
        running = self._loop.post(self._service.serve(prepared, channel))
        finished = False
        try:
            while not finished:
                chunk = await channel.get()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                running.cancel()

    def storage_scope(self, scope: ReuseScope) -> ReuseScope:
        """See `Engine.storage_scope`: the connector is told a number instead of the salt."""
        return self._service.storage_scope(scope)

    def num_device_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """See `Engine.num_device_blocks`: by the events so far."""
        return self._service.events.num_on_device(hashes)

    def take_cache_changes(self) -> CacheChanges:
        """See `Engine.take_cache_changes`; waits for the engine's loop."""
        if self._is_closed:
            return CacheChanges()
        return self._loop.call(self._take_changes(), CHANGES_TIMEOUT_S)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._service.statistics.snapshot(moves_loaded=self._mode == "shared")

    def flush(self, timeout_s: float) -> bool:
        """See `Engine.flush`."""
        return self.cache is None or self.cache.flush(timeout_s)

    def is_alive(self) -> bool:
        """See `Engine.is_alive`."""
        return not self._is_closed and self._watch.failure is None and not self._has_shut_down()

    def check(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Generate one token; raises `KvcommonsError`, why that cannot be done in time."""
        self._loop.call(self._watch.check(timeout_s), timeout_s + 1)
        self._loop.call(self._watch.look(), timeout_s)
        failure = self._watch.failure
        if failure is not None:
            raise KvcommonsError(f"TensorRT-LLM does not generate: {failure}") from failure

    def close(self) -> None:
        """Stop; running requests end with `abort`. Waits for queued saves and for GPU memory.

        Raises `KvcommonsError`, which says what to do, when memory does not get free. Again is a
        no-op.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._service.end_all()
        ending = threading.Thread(target=self._shut_down, name="kvcommons-shutdown", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_TIMEOUT_S)
        if ending.is_alive():
            logger.warning("TensorRT-LLM's shutdown hangs since %g s", SHUTDOWN_TIMEOUT_S)
        self._loop.stop()
        self._llm = None
        self._service.let_go()
        self._watch.let_go()
        self._part.leave()
        self._end()

    def _shut_down(self) -> None:
        try:
            self._llm.shutdown()
        except Exception:  # its threads may be gone already; what counts is the memory
            logger.warning("TensorRT-LLM's shutdown failed", exc_info=True)

    async def _run_watch(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch.run()

    async def _take_changes(self) -> CacheChanges:
        return self._service.events.take_changes()

    def _has_shut_down(self) -> bool:
        """Whether TensorRT-LLM's own executor has ended; by a name that is not public."""
        ask = getattr(getattr(self._llm, "_executor", None), "is_shutdown", None)
        return bool(ask()) if callable(ask) else False

    def _why_not(self) -> str:
        if self._is_closed:
            return "this engine is closed"
        return f"the engine has failed: {self._watch.failure or 'TensorRT-LLM has shut down'}"
