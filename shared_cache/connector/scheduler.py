"""The connector's scheduler side: TensorRT-LLM's hooks, answered from verified host memory alone.

It runs inside the engine's step, under the engine's locks, so nothing here waits for longer than
its `MatchRule` says. An error in a hook would end the engine's loop, so errors are counted and
logged, and answered with "no match" or "nothing to save". No hook raises.
"""

import logging
import time
from dataclasses import dataclass, field

from shared_cache.connector.identity import has_media, is_named_by_tokens, reuse_scope
from shared_cache.connector.interface import ConnectorRequest, RequestData, SchedulerOutput
from shared_cache.connector.match_log import Matched, MatchLog
from shared_cache.connector.matching import Matcher, Wanted
from shared_cache.connector.matching import MatchRule as MatchRule
from shared_cache.connector.plan import RequestLedger
from shared_cache.connector.requests import Prompt
from shared_cache.connector.transfers import (
    MAX_SAVES,
    Load,
    PackedLoads,
    SaveRun,
    TransferPlan,
    num_saves_beside,
    pack_loads,
)
from shared_cache.faults import Clock, FaultLog
from shared_cache.hashing import BlockHashChain
from shared_cache.prefix_cache import PrefixCache

logger = logging.getLogger(__name__)

STAGED_AHEAD = MatchRule()


@dataclass(slots=True)
class _TurnSaves:
    """What one turn saves, as far as it is planned: an error keeps what was planned before it."""

    runs: list[SaveRun] = field(default_factory=list)
    early: tuple[SaveRun, ...] = ()
    let_go: tuple[int, ...] = ()


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
        ahead_from_blocks: int | None = None,
        holds_unsaved: bool = False,
    ) -> None:
        """`matches` is told every answer, for an engine beside this one.

        Loads of at least `ahead_from_blocks` blocks are asynchronous: the engine goes on with other
        requests until they are done. None: no load is. With `holds_unsaved` no more blocks are
        saved in a turn than host memory was reserved for; the others wait for a later turn, for
        which the blocks of ended requests are held. The engine then goes on taking turns.
        """
        self._holds_unsaved = holds_unsaved
        self._ahead_from_blocks = ahead_from_blocks
        self._cache = cache
        self._tokens_per_block = tokens_per_block
        self._matches = matches
        self._matcher = Matcher(cache, rule)
        self._ledger = RequestLedger(clock, holds=holds_unsaved)
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
        """Tokens that will be loaded from host memory, whole blocks, and whether asynchronously.

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
        least = self._ahead_from_blocks
        is_ahead = least is not None and num_tokens >= max(1, least) * self._tokens_per_block
        if is_ahead:
            self._ledger.load_ahead(request.request_id)
        return num_tokens, is_ahead

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
        try:
            loads = self._plan_loads(scheduler_output)
            ahead = self._plan_ahead()
        except Exception as error:
            self._faults.record("planning loads that were promised", error)
            return TransferPlan(refusal=f"{type(error).__name__}: {error}")
        planned = _TurnSaves()
        with self._faults.caught("the build hook"):
            room = num_saves_beside([*loads, *(part for _, parts in ahead for part in parts)])
            self._plan_saves(scheduler_output, room, planned)
            self._release()
        return TransferPlan(
            loads, tuple(planned.runs), planned.early, loads_ahead=ahead, let_go=planned.let_go
        )

    def request_finished(self, request: ConnectorRequest, cache_block_ids: list[int]) -> bool:
        """False, so blocks may be freed at once: what waits is copied before the next turn.

        True only while the request's load may be under way; `get_finished` then says when it is
        not. Nothing writes to the device between this and that turn's `start_load_kv`, but for the
        copies of partial reuse; see the match.
        """
        with self._faults.caught("the finish hook"):
            is_loading = self._ledger.finish(request.request_id, len(request.get_tokens(0)))
            self._release()
            return is_loading
        return False

    def close(self) -> None:
        """Look up nothing from now on; leases end with the cache."""
        self._matcher.close()

    def _match(self, request: ConnectorRequest, num_computed_tokens: int) -> int:
        scope, size = reuse_scope(request), self._tokens_per_block
        tokens = list(request.get_tokens(0))
        known: BlockHashChain | None = getattr(request, "hash_chain", None)
        chain = BlockHashChain(size, scope, tokens) if known is None else known.copy()
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

    def _plan_ahead(self) -> tuple[tuple[int, tuple[PackedLoads, ...]], ...]:
        return tuple(
            (request_id, pack_loads([Load(self._cache.places(load.lease), load.device_blocks)]))
            for request_id, load in self._ledger.take_ahead()
        )

    def _plan_saves(self, output: SchedulerOutput, room: int, planned: _TurnSaves) -> None:
        """Add what this turn saves in the `room` of its plan: first what ended requests left."""
        budget = self._cache.turn_budget
        planned.early = self._ledger.take_early_saves(room)
        room -= sum(run.room for run in planned.early)
        allowed = budget.begin_turn(self._ledger.is_decoding(output.cached_requests))
        most = self._most_saves(allowed)
        leaving, planned.let_go = self._ledger.take_leaving(room, most)
        planned.early += tuple(leaving)
        room -= sum(run.room for run in leaving)
        left = most - sum(run.num_blocks for run in leaving)
        self._take_saves(output, planned.runs, room, left)
        num_saves = sum(run.num_blocks for run in (*leaving, *planned.runs))
        budget.spend(num_saves)
        if self._holds_unsaved and num_saves == most:
            self._cache.reserve_more_ahead()

    def _most_saves(self, allowed: int | None) -> int:
        """Blocks that may be saved in this turn, of which copies may take `allowed`."""
        reserved = self._cache.num_reserved_ahead if self._holds_unsaved else None
        return min(one for one in (MAX_SAVES, reserved, allowed) if one is not None)

    def _take_saves(
        self, output: SchedulerOutput, saves: list[SaveRun], room: int, left: int
    ) -> None:
        """Add what this turn saves: all that is complete, or less while copies hold up others.

        There is `room` in the plan, and for `left` blocks otherwise. An error with one request is
        no reason to forget the others.
        """
        for is_new, reports in ((True, output.new_requests), (False, output.cached_requests)):
            for report in reports:
                run = self._take_save(report, is_new, max(0, min(left, room)))
                if run is not None:
                    saves.append(run)
                    left, room = left - run.num_blocks, room - run.room

    def _take_save(self, report: RequestData, is_new: bool, most: int) -> SaveRun | None:
        with self._faults.caught("planning the saves of a request"):
            return self._ledger.take_save(report, is_new, most)
        return None

    def _release(self) -> None:
        """Give back what the ledger no longer needs, and count what it could not have saved."""
        self._cache.lose(self._ledger.take_lost())
        for lease in self._ledger.take_released():
            self._cache.release(lease)
