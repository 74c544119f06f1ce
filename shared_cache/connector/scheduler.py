"""The connector's scheduler side: TensorRT-LLM's hooks, answered from host memory alone.

It runs inside the engine's step, under the engine's locks, so nothing here waits for a store: the
prefix was staged before the request entered the engine. An error in a hook would end the engine's
loop, so errors are counted and logged, and answered with "no match" or "nothing to save". There is
one exception: see `build_connector_meta`.
"""

import logging
import time

from shared_cache.connector.interface import ConnectorRequest, SchedulerOutput
from shared_cache.connector.plan import RequestLedger
from shared_cache.connector.transfers import SaveRun, TransferPlan
from shared_cache.faults import Clock, FaultLog
from shared_cache.hashing import BlockHashChain, ReuseScope
from shared_cache.staging import SharedCache

logger = logging.getLogger(__name__)


def reuse_scope(request: ConnectorRequest) -> ReuseScope:
    """Who may reuse this request's blocks, from the attributes that its engine has."""
    salt = getattr(request, "cache_salt", None)
    salt_id = getattr(request, "cache_salt_id", None)
    lora_id = getattr(request, "lora_task_id", None)
    if salt is None and salt_id is not None:
        salt = f"cache_salt_id:{salt_id}"
    return ReuseScope(
        cache_salt=None if salt is None else str(salt),
        lora_id=None if lora_id is None else str(lora_id),
    )


class SharedCacheScheduler:
    """Implements `KvCacheConnectorScheduler` over one replica's cache.

    All hooks are called on the engine's loop thread.
    """

    def __init__(
        self, cache: SharedCache, tokens_per_block: int, clock: Clock = time.monotonic
    ) -> None:
        self._cache = cache
        self._tokens_per_block = tokens_per_block
        self._ledger = RequestLedger(tokens_per_block, clock)
        self._faults = FaultLog(logger, clock)

    @property
    def connector_faults(self) -> int:
        """Errors that were kept from the engine since the start."""
        return self._faults.num_faults

    @property
    def num_tracked_requests(self) -> int:
        """Requests that have state here; 0 once all have finished."""
        return len(self._ledger)

    def get_num_new_matched_tokens(
        self, request: ConnectorRequest, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens that will be loaded from host memory, whole blocks; never asynchronously.

        The blocks are leased: from here on the load cannot fail. Multimodal requests match
        nothing and are not saved, as token ids do not tell two pictures apart.
        """
        num_tokens = 0
        with self._faults.caught("the match hook"):
            if getattr(request, "multimodal_hashes", None):
                self._ledger.forget(request.request_id)
            else:
                num_tokens = self._match(request, num_computed_tokens)
            self._release()
        return num_tokens, False

    def update_state_after_alloc(self, request: ConnectorRequest, block_ids: list[int]) -> None:
        """Nothing: the turn's report names the same blocks, and all later ones."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> TransferPlan:
        """This turn's copies.

        Raises when a promised load cannot be planned. The engine counts promised tokens as
        computed; to go on would let it attend to garbage, and save it for everybody else.
        """
        saves: tuple[SaveRun, ...] = ()
        early_saves = self._ledger.take_early_saves()
        loads = self._ledger.begin_turn(scheduler_output.new_requests)
        with self._faults.caught("the build hook"):
            saves = self._take_saves(scheduler_output)
            self._release()
        return TransferPlan(loads, saves, early_saves)

    def request_finished(self, request: ConnectorRequest, cache_block_ids: list[int]) -> bool:
        """Always False, so blocks may be freed at once: what waits is copied before the next turn.

        Nothing writes to the device between this and that turn's `start_load_kv`.
        """
        with self._faults.caught("the finish hook"):
            self._ledger.finish(request.request_id)
            self._release()
        return False

    def _match(self, request: ConnectorRequest, num_computed_tokens: int) -> int:
        scope = reuse_scope(request)
        chain = BlockHashChain(self._tokens_per_block, scope, request.get_tokens(0))
        num_device_blocks = num_computed_tokens // self._tokens_per_block
        lease = self._cache.host.lease_held(chain.hashes[num_device_blocks:])
        num_tokens = self._ledger.matched(
            request.request_id, chain, num_computed_tokens, lease, scope.tenant
        )
        num_blocks = num_tokens // self._tokens_per_block
        logger.info(
            "KV CONNECTOR: matched %d blocks for request %s", num_blocks, request.request_id
        )
        return num_tokens

    def _take_saves(self, output: SchedulerOutput) -> tuple[SaveRun, ...]:
        """What this turn saves: all that is complete, or less while copies would hold up others."""
        budget = self._cache.turn_budget
        max_blocks = budget.begin_turn(self._ledger.is_decoding(output.cached_requests))
        saves = self._ledger.take_saves(output.new_requests, output.cached_requests, max_blocks)
        budget.spend(sum(len(run.device_blocks) for run in saves))
        return saves

    def _release(self) -> None:
        """Give back what the ledger no longer needs, and count what it could not have saved."""
        self._cache.lose(self._ledger.take_lost())
        for lease in self._ledger.take_released():
            self._cache.host.release(lease)
