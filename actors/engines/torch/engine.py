"""The embedded engine: what a replica owns, and the thread behind it.

Coroutines hand requests in through an inbox and read chunks from channels; nothing else crosses the
border to the engine's thread, so nothing in a turn needs a lock.
"""

import logging
import threading
from collections.abc import AsyncGenerator

import torch

from actors.config import EngineConfig
from actors.engine import EngineStats, GenerationRequest, KvCacheStats, TokenChunk
from actors.engines.torch.attention import PagedPool
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.intake import Inbox, RequestFactory
from actors.engines.torch.model import LoadedModel
from actors.engines.torch.runner import Runner
from actors.engines.torch.scheduler import Limits
from actors.engines.torch.slots import SlotPool
from actors.engines.torch.turns import TurnLoop
from shared_cache.errors import ModelError, ReplicaUnavailableError
from shared_cache.namespace import Namespace
from shared_cache.staging import SharedCache

logger = logging.getLogger(__name__)

_RETRY_S = 0.001
_FLUSH_S = 30.0
_CPU_TURN_DRAFTS = 16
"""On a CPU a pass over 16 tokens costs about as much as one over 4; beyond, every token counts."""


class TorchEngine:
    """Implements `actors.engine.Engine` on transformers and one pool.

    Owns `connector` and `cache`, and closes them. Raises what the first, tiny forward pass raises:
    an engine that cannot run does not start.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: PagedPool,
        namespace: Namespace,
        config: EngineConfig,
        connector: ConnectorDriver | None = None,
        cache: SharedCache | None = None,
    ) -> None:
        num_slots, tokens_per_block = len(pool.tensor), pool.layout.tokens_per_block
        self.namespace = namespace
        self.cache = cache
        self.tokenizer = model.tokenizer
        self.max_total_tokens = min(model.max_seq_len, num_slots * tokens_per_block)
        self._config = config
        self._connector = connector
        self._slots = SlotPool(num_slots)
        self._tokens_per_block = tokens_per_block
        ngram = config.speculative_config
        self._factory = RequestFactory(model, tokens_per_block, self.max_total_tokens, ngram)
        self._runner = Runner(model, pool, connector)
        self._turns = TurnLoop(self._runner, self._slots, _limits(config), connector)
        self._inbox = Inbox()
        self._is_closed = False
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

    def is_alive(self) -> bool:
        """See `Engine.is_alive`."""
        return self._failure is None and self._thread.is_alive()

    def close(self) -> None:
        """Stop; running requests end with `abort`. Waits for queued saves; again is a no-op."""
        self._inbox.close("this engine is closed")
        self._thread.join()
        if self._is_closed:
            return
        self._is_closed = True
        if self._connector is not None:
            self._connector.close()
        if self.cache is not None:
            if not self.cache.flush(_FLUSH_S):
                logger.warning("saves were still queued %g s after the end; dropped", _FLUSH_S)
            self.cache.close()
        self._runner.free_pool()

    def _start(self) -> None:
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="kvcommons-engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise ModelError(f"the model does not run: {self._failure}") from self._failure

    def _run(self) -> None:
        """The engine's thread: turns until closed. An error outside a pass ends the engine."""
        last: TokenChunk | Exception = TokenChunk((), "", finish_reason="abort")
        try:
            if self._config.torch_threads is not None:
                torch.set_num_threads(self._config.torch_threads)
            with torch.inference_mode():
                self._runner.warm_up()
                self._ready.set()
                self._serve()
        except Exception as error:
            logger.exception("the engine stopped")
            self._failure = error
            last = ReplicaUnavailableError(f"the engine stopped: {error}")
        finally:
            self._inbox.close(str(last) if isinstance(last, Exception) else "this engine is closed")
            for active in self._inbox.take(timeout_s=0).arrivals:
                self._turns.add(active)
            self._turns.end_all(last)
            self._ready.set()

    def _serve(self) -> None:
        ran = True
        while True:
            idle_s = None if not self._turns.has_work else 0 if ran else _RETRY_S
            delivery = self._inbox.take(idle_s)
            for active in delivery.arrivals:
                self._turns.add(active)
            for active in delivery.aborts:
                self._turns.abort(active)
            if delivery.closing:
                return
            ran = self._turns.turn() if self._turns.has_work else True


def _limits(config: EngineConfig) -> Limits:
    ngram = config.speculative_config
    return Limits(
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.max_num_tokens,
        block_reuse=config.kv_cache_config.enable_block_reuse,
        max_draft_len=ngram.max_draft_len if ngram else 0,
        max_turn_drafts=_CPU_TURN_DRAFTS if config.device == "cpu" else config.max_num_tokens,
    )
