"""The connector's scheduler side: TensorRT-LLM's hooks, answered from verified host memory alone.

It runs inside the engine's step, under the engine's locks, so nothing here waits for longer than
its `MatchRule` says. An error in a hook would end the engine's loop, so errors are counted and
logged, and answered with "no match" or "nothing to save". No hook raises.
"""

import logging
import time
from collections.abc import Mapping

from shared_cache.connector.interface import ConnectorRequest, RequestData, SchedulerOutput
from shared_cache.connector.match_log import Matched, MatchLog
from shared_cache.connector.matching import Matcher, Wanted
from shared_cache.connector.matching import MatchRule as MatchRule
from shared_cache.connector.plan import RequestLedger
from shared_cache.connector.requests import Prompt
from shared_cache.connector.transfers import (
    Load,
    PackedLoads,
    SaveRun,
    TransferPlan,
    num_saves_beside,
    pack_loads,
)
from shared_cache.faults import Clock, FaultLog
from shared_cache.hashing import BlockHashChain, ReuseScope
from shared_cache.prefix_cache import PrefixCache

logger = logging.getLogger(__name__)

STAGED_AHEAD = MatchRule()

_NOT_TOKENS_ALONE = (
    "multimodal_hashes",
    "multimodal_positions",
    "multimodal_embedding",
    "prompt_embedding_table",
)
"""Attributes that are set where token ids do not tell all that decides a prompt's KV."""

_DUMMIES = ("is_dummy_request", "is_cuda_graph_dummy", "is_attention_dp_dummy")
"""Attributes of the requests that an engine makes up, to warm up or to fill a batch."""


def salt_by_id(cache_salt_id: int) -> str:
    """What stands for a salt whose engine gave its connector a number instead."""
    return f"cache_salt_id:{cache_salt_id}"


def reuse_scope(request: ConnectorRequest) -> ReuseScope:
    """Who may reuse this request's blocks, from the attributes that its engine has.

    The salt's number comes before the salt: every version of TensorRT-LLM has it, so who stages for
    one knows which of the two the connector takes.
    """
    salt = getattr(request, "cache_salt", None)
    salt_id = getattr(request, "cache_salt_id", None)
    lora_id = getattr(request, "lora_task_id", None)
    if salt_id is not None:
        salt = salt_by_id(salt_id)
    return ReuseScope(
        cache_salt=None if salt is None else str(salt),
        lora_id=None if lora_id is None else str(lora_id),
    )


def is_named_by_tokens(request: ConnectorRequest) -> bool:
    """Whether scope and token ids say all about a request's KV; not so for pictures and dummies."""
    if any(getattr(request, name, False) is True for name in _DUMMIES):
        return False
    given = (getattr(request, name, None) for name in _NOT_TOKENS_ALONE)
    return all(value is None or (isinstance(value, list) and not value) for value in given)


def has_media(request: ConnectorRequest) -> bool:
    """Whether Python's part of a request brings pictures, sound, or embeddings of its own.

    Models that take pictures get their positions (`mrope_config`) with text alone, too.
    """
    data = getattr(request, "py_multimodal_data", None)
    if data is None:
        return False
    return not isinstance(data, Mapping) or any(name != "mrope_config" for name in data)


class SharedCacheScheduler:
    """Implements `KvCacheConnectorScheduler` over the cache of one engine, on rank 0.

    All hooks are called on the engine's loop thread.
    """

    def __init__(
        self,
        cache: PrefixCache,
        tokens_per_block: int,
        rule: MatchRule = STAGED_AHEAD,
        clock: Clock = time.monotonic,
        matches: MatchLog | None = None,
    ) -> None:
        """`matches` is told every answer, for an engine beside this one."""
        self._cache = cache
        self._tokens_per_block = tokens_per_block
        self._matches = matches
        self._matcher = Matcher(cache, rule)
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

        The blocks are leased: from here on the load cannot fail. Requests with more than tokens
        (pictures, prompt embeddings) match nothing and are not saved, as token ids do not tell two
        of them apart.
        """
        num_tokens = 0
        with self._faults.caught("the match hook"):
            if num_computed_tokens % self._tokens_per_block:
                # Part of a block is reused (`enable_partial_reuse`): it was copied to a free block
                # just now, perhaps to one of an ended request that waits to be saved.
                self._ledger.lose_early_saves()
            self._ledger.forget(request.request_id)  # one of that id that vanished
            if is_named_by_tokens(request):
                num_tokens = self._match(request, num_computed_tokens)
            self._release()
        return num_tokens, False

    def update_state_after_alloc(self, request: ConnectorRequest, block_ids: list[int]) -> None:
        """Note which device blocks a promise is about; the turn's report should say the same.

        Media without hashes show only here: the match call's object does not have them. Nothing of
        such a request is saved. What it was promised is loaded: that is text in front of the first
        picture, as nothing with a picture was ever saved.
        """
        with self._faults.caught("the allocation hook"):
            if has_media(request):
                self._ledger.never_save(request.request_id)
            self._ledger.allocated(request.request_id, block_ids)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> TransferPlan:
        """This turn's copies; what cannot be saved is not, what cannot be loaded stops the turn.

        A promise that cannot be kept (the engine did not say which blocks it is about) must not go
        unnoticed: the engine counts promised tokens as computed. It would answer from garbage, and
        keep the garbage in its own reuse tree for everybody else; it does so for failed requests
        too, so raising behind the forward pass does not help. Raised from here, on rank 0 alone,
        it would leave the other ranks waiting for the broadcast. So the plan carries a refusal to
        all ranks, and each worker raises it before its forward pass: the engine ends on every rank
        in the same turn, with the reason in its log, and nothing wrong was computed.
        """
        self._matcher.begin_turn()
        loads: tuple[PackedLoads, ...] = ()
        saves: list[SaveRun] = []
        early_saves: tuple[SaveRun, ...] = ()
        try:
            loads = self._plan_loads(scheduler_output)
        except Exception as error:
            self._faults.record("planning loads that were promised", error)
            return TransferPlan(refusal=f"{type(error).__name__}: {error}")
        with self._faults.caught("the build hook"):
            room = num_saves_beside(loads)
            early_saves = self._ledger.take_early_saves(room)
            room -= sum(run.room for run in early_saves)
            self._take_saves(scheduler_output, saves, room)
            self._release()
        return TransferPlan(loads, tuple(saves), early_saves)

    def request_finished(self, request: ConnectorRequest, cache_block_ids: list[int]) -> bool:
        """Always False, so blocks may be freed at once: what waits is copied before the next turn.

        Nothing writes to the device between this and that turn's `start_load_kv`, but for the
        copies of partial reuse; see the match.
        """
        with self._faults.caught("the finish hook"):
            self._ledger.finish(request.request_id, len(request.get_tokens(0)))
            self._release()
        return False

    def close(self) -> None:
        """Look up nothing from now on; leases end with the cache."""
        self._matcher.close()

    def _match(self, request: ConnectorRequest, num_computed_tokens: int) -> int:
        scope, size = reuse_scope(request), self._tokens_per_block
        tokens = list(request.get_tokens(0))
        chain = BlockHashChain(size, scope, tokens)
        num_reusable = max(0, len(tokens) - 1) // size
        hashes = tuple(chain.hashes)  # a look-up that comes late reads them beside this thread
        wanted = Wanted(hashes, num_computed_tokens // size, num_reusable, scope)
        prompt = Prompt(tokens, chain, scope.tenant)
        lease = wanted.nothing
        with self._faults.caught("looking a prompt up"):  # it has to be known all the same
            lease = self._matcher.lease(wanted)
        num_tokens = self._ledger.matched(request.request_id, prompt, num_computed_tokens, lease)
        try:
            if self._matches is not None:
                self._matches.note(chain, Matched(num_computed_tokens, num_tokens))
        except BaseException:  # the engine is told of no match, so nothing may be promised
            self._ledger.forget(request.request_id)
            raise
        logger.info(
            "KV CONNECTOR: matched %d blocks for request %s", num_tokens // size, request.request_id
        )
        return num_tokens

    def _plan_loads(self, output: SchedulerOutput) -> tuple[PackedLoads, ...]:
        planned = self._ledger.begin_turn(output.new_requests, output.cached_requests)
        return pack_loads(
            [Load(self._cache.places(load.lease), load.device_blocks) for load in planned]
        )

    def _take_saves(self, output: SchedulerOutput, saves: list[SaveRun], room: int) -> None:
        """Add what this turn saves: all that is complete, or less while copies hold up others.

        There is `room` in the plan. An error with one request is no reason to forget the others.
        """
        budget = self._cache.turn_budget
        allowed = budget.begin_turn(self._ledger.is_decoding(output.cached_requests))
        left = room if allowed is None else allowed
        for is_new, reports in ((True, output.new_requests), (False, output.cached_requests)):
            for report in reports:
                run = self._take_save(report, is_new, max(0, min(left, room)))
                if run is not None:
                    saves.append(run)
                    left, room = left - run.num_blocks, room - run.room
        budget.spend(sum(run.num_blocks for run in saves))

    def _take_save(self, report: RequestData, is_new: bool, most: int) -> SaveRun | None:
        with self._faults.caught("planning the saves of a request"):
            return self._ledger.take_save(report, is_new, most)
        return None

    def _release(self) -> None:
        """Give back what the ledger no longer needs, and count what it could not have saved."""
        self._cache.lose(self._ledger.take_lost())
        for lease in self._ledger.take_released():
            self._cache.release(lease)
