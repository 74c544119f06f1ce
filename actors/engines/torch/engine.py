"""The embedded engine: what a replica owns, and the thread behind it.

Coroutines hand requests in through an inbox and read chunks from channels; nothing else crosses the
border to the engine's thread, so nothing in a turn needs a lock.
"""

import logging
import time
from collections.abc import AsyncGenerator, Sequence

from actors.config import EngineConfig
from actors.engine import (
    CacheChanges,
    EngineStats,
    GenerationRequest,
    KvCacheStats,
    Preload,
    TokenChunk,
)
from actors.engines.torch.choose_forward import make_forward
from actors.engines.torch.compute import ComputeThread
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.intake import Inbox, RequestFactory
from actors.engines.torch.model import LoadedModel
from actors.engines.torch.pool import PagedPool
from actors.engines.torch.runner import Runner
from actors.engines.torch.scheduler import Limits
from actors.engines.torch.slots import SlotPool
from actors.engines.torch.turns import TurnLoop
from shared_cache.errors import ModelError, ReplicaUnavailableError
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.namespace import Namespace

logger = logging.getLogger(__name__)

_RETRY_S = 0.001
_LOADING_RETRY_S = 0.0002
_LOADING_TOLD_S = 0.02
"""Instead, where the end of a load is told: a turn takes the interpreter's lock from threads that
bring the next blocks."""

_CPU_TURN_DRAFTS = 16
"""On a CPU a pass over 16 tokens costs about as much as one over 4; beyond, every token counts."""

_GPU_TURN_DRAFTS = 192
"""On a GPU it is bound by reading the weights up to some 200 tokens."""


class TorchEngine:
    """Implements `actors.engine.Engine` on transformers and one pool.

    Takes over `thread`, on which model and pool were made, and `connector`; `close` ends both.
    Raises `ModelError` when a first, tiny forward pass fails: such an engine does not start.
    """

    def __init__(
        self,
        thread: ComputeThread,
        model: LoadedModel,
        pool: PagedPool,
        namespace: Namespace,
        config: EngineConfig,
        connector: ConnectorDriver | None = None,
    ) -> None:
        num_slots, tokens_per_block = pool.num_slots, pool.layout.tokens_per_block
        self.namespace = namespace
        self.cache = connector.cache if connector is not None else None
        self.tokenizer = model.tokenizer
        self.max_total_tokens = min(model.max_seq_len, num_slots * tokens_per_block)
        self._tokens_per_block = tokens_per_block
        self._connector = connector
        self._can_preload = connector is not None and pool.tensor.is_cuda
        self._slots = SlotPool(num_slots)
        ngram = config.speculative_config
        self._factory = RequestFactory(model, tokens_per_block, self.max_total_tokens, ngram)
        forward = make_forward(model, pool, config, self.max_total_tokens)
        self._runner = Runner(forward, pool, connector)
        overlap = not config.disable_overlap_scheduler
        self._turns = TurnLoop(
            self._runner, self._slots, _limits(config), connector, overlap=overlap
        )
        self._inbox = Inbox()
        is_told = connector is not None and connector.tell_when_loaded(self._inbox.wake)
        self._loading_retry_s = _LOADING_TOLD_S if is_told else _LOADING_RETRY_S
        self._is_closed = False
        self._failure: Exception | None = None
        self._thread = thread
        self._start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `Engine.generate`."""
        active = self._factory.make(request)
        self._inbox.submit(active)
        finished = False
        try:
            while not finished:
                chunk = await active.channel.get()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                self._inbox.abort(active)

    @property
    def preload(self) -> Preload | None:
        """See `Engine.preload`: only where a copy to the device needs none of our time."""
        return self._preload if self._can_preload else None

    async def _preload(self, request: GenerationRequest, num_blocks: int) -> range:
        active = self._factory.make(request, only_load=num_blocks)
        self._inbox.submit(active)
        has_ended = False
        try:
            await active.channel.get()
            has_ended = True
        finally:
            if not has_ended:
                self._inbox.abort(active)
        return range(active.sequence.num_device_tokens, active.sequence.num_computed)

    def storage_scope(self, scope: ReuseScope) -> ReuseScope:
        """See `Engine.storage_scope`: the connector sees the scope itself."""
        return scope

    def num_device_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """See `Engine.num_device_blocks`."""
        return self._slots.match(hashes)

    def take_cache_changes(self) -> CacheChanges:
        """See `Engine.take_cache_changes`."""
        return self._slots.take_changes()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        turns, scheduler, slots = self._turns, self._turns.scheduler, self._slots
        num_available = slots.num_available
        kv_cache = KvCacheStats(
            max_num_blocks=slots.num_slots,
            free_num_blocks=num_available,
            used_num_blocks=slots.num_slots - num_available,
            tokens_per_block=self._tokens_per_block,
            alloc_total_blocks=slots.num_allocated + slots.num_acquired,
            alloc_new_blocks=slots.num_allocated,
            reused_blocks=scheduler.num_reused_blocks,
            missed_blocks=scheduler.num_missed_blocks,
        )
        return EngineStats(
            kv_cache=kv_cache,
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            prefill_tokens=turns.prefill_tokens,
            generated_tokens=turns.generated_tokens,
            accepted_draft_tokens=turns.accepted_draft_tokens,
            proposed_draft_tokens=turns.proposed_draft_tokens,
            num_turns=turns.num_turns,
        )

    def flush(self, timeout_s: float) -> bool:
        """See `Engine.flush`."""
        if self.cache is None:
            return True
        deadline_s = time.monotonic() + timeout_s
        while self._turns.is_holding and self.is_alive() and time.monotonic() < deadline_s:
            time.sleep(_RETRY_S)
        return self.cache.flush(max(0.0, deadline_s - time.monotonic()))

    def is_alive(self) -> bool:
        """See `Engine.is_alive`."""
        return self._failure is None and not self._served.done()

    def close(self) -> None:
        """Stop; running requests end with `abort`. Waits for queued saves; again is a no-op."""
        self._inbox.close("this engine is closed")
        self._thread.stop()
        if self._is_closed:
            return
        self._is_closed = True
        if self._connector is not None:
            self._connector.close()
        self._runner.free_pool()

    def _start(self) -> None:
        try:
            self._thread.call(self._runner.warm_up)
        except Exception as error:
            raise ModelError(f"the model does not run: {error}") from error
        self._served = self._thread.post(self._run)

    def _run(self) -> None:
        """On the engine's thread: turns until closed. An error outside a pass ends the engine."""
        last: TokenChunk | Exception = TokenChunk((), "", finish_reason="abort")
        try:
            self._serve()
        except Exception as error:
            logger.exception("the engine stopped")
            self._failure = error
            last = ReplicaUnavailableError(f"the engine stopped: {error}")
            self._inbox.close(str(last))
        for active in self._inbox.take(timeout_s=0).arrivals:
            self._turns.add(active)
        self._turns.end_all(last)

    def _serve(self) -> None:
        ran = True
        while True:
            delivery = self._inbox.take(self._idle_s(ran))
            for active in delivery.arrivals:
                self._turns.add(active)
            for active in delivery.aborts:
                self._turns.abort(active)
            if delivery.closing:
                return
            ran = self._turns.turn() if self._turns.has_work else True

    def _idle_s(self, ran: bool) -> float | None:
        """How long to wait for news at most before the next turn, when the last one `ran`."""
        if not self._turns.has_work:
            return None
        if ran:
            return 0
        if not self._turns.is_loading:
            return _RETRY_S
        most_s = _RETRY_S if self._turns.is_holding else _LOADING_TOLD_S
        return min(most_s, self._loading_retry_s)


def _limits(config: EngineConfig) -> Limits:
    ngram = config.speculative_config
    return Limits(
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.max_num_tokens,
        block_reuse=config.kv_cache_config.enable_block_reuse,
        separate_tail=config.is_cuda and config.kv_cache_config.enable_block_reuse,
        max_draft_len=ngram.max_draft_len if ngram else 0,
        max_turn_drafts=_GPU_TURN_DRAFTS if config.is_cuda else _CPU_TURN_DRAFTS,
    )
