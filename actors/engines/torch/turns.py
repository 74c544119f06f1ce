"""Decide, run, record: what the engine's thread does in one turn.

A forward pass that fails takes the requests in it with it, and no other: their slots come back and
the engine goes on.
"""

import logging
import time

from actors.engine import TokenChunk
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.request import ActiveRequest
from actors.engines.torch.runner import Choices, Runner, Sampler
from actors.engines.torch.scheduler import Limits, Scheduled, Scheduler, Turn, verified
from actors.engines.torch.sequence import Sequence
from actors.engines.torch.slots import SlotPool
from shared_cache.errors import ModelError

logger = logging.getLogger(__name__)


class TurnLoop:
    """The requests of one engine and the turns that serve them.

    All methods are for the engine's thread; the public counters may be read from any.
    """

    def __init__(
        self, runner: Runner, pool: SlotPool, limits: Limits, connector: ConnectorDriver | None
    ) -> None:
        self.scheduler = Scheduler(pool, limits, self._match, self._allocated)
        self.num_turns = 0
        self.prefill_tokens = 0
        self.generated_tokens = 0
        self.accepted_draft_tokens = 0
        self.proposed_draft_tokens = 0
        self._runner = runner
        self._pool = pool
        self._connector = connector
        self._active: dict[int, ActiveRequest] = {}
        self._refused: dict[Sequence, Exception] = {}

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._active)

    def add(self, active: ActiveRequest) -> None:
        """Queue a request."""
        self._active[active.sequence.request_id] = active
        self.scheduler.add(active.sequence)

    def abort(self, active: ActiveRequest) -> None:
        """End a request without a word; one that has ended is no error."""
        if active.sequence.request_id in self._active:
            self._end(active)

    def end_all(self, last: TokenChunk | Exception) -> None:
        """End every request with `last`; all are told before anything that could fail."""
        for active in self._active.values():
            active.channel.put(last)
        for active in list(self._active.values()):
            self._end(active)

    def turn(self) -> bool:
        """Serve one turn; False when nothing could run."""
        turn = self._decide()
        if turn.items:
            self._start(turn)
            try:
                choices = self._runner.run(turn, self._samplers())
            except Exception as error:  # whatever a model, a device or a connector may raise
                logger.exception("a forward pass with %d requests failed", len(turn.items))
                self._fail([item.sequence for item in turn.items], error)
            else:
                for item in turn.items:
                    self._record_or_fail(item, choices)
        if self._connector is not None:
            self._pool.release(self._connector.end_turn())
        return bool(turn.items)

    def _decide(self) -> Turn:
        turn = self.scheduler.decide()
        if not self._refused:
            return turn
        refused, self._refused = self._refused, {}
        for sequence, error in refused.items():
            self._fail([sequence], error)
        kept = tuple(item for item in turn.items if item.sequence not in refused)
        return Turn(kept, turn.fresh_slots)

    def _match(self, sequence: Sequence) -> int:
        if self._connector is None:
            return 0
        try:
            return self._connector.match(sequence)
        except Exception as error:
            logger.exception("the connector failed to match request %d", sequence.request_id)
            self._refused[sequence] = error
            return 0

    def _allocated(self, sequence: Sequence) -> None:
        if self._connector is not None and sequence not in self._refused:
            self._connector.allocated(sequence)

    def _start(self, turn: Turn) -> None:
        self.num_turns += 1
        now = time.monotonic()
        for item in turn.items:
            active = self._active[item.sequence.request_id]
            if active.started_s is None:
                active.started_s = now
            num_prompt_left = item.sequence.num_prompt_tokens - item.start
            self.prefill_tokens += min(max(num_prompt_left, 0), item.num_tokens)
            self.proposed_draft_tokens += len(item.drafts)

    def _samplers(self) -> dict[int, Sampler]:
        samplers = ((key, active.sampler) for key, active in self._active.items())
        return {key: sampler for key, sampler in samplers if sampler is not None}

    def _record_or_fail(self, item: Scheduled, choices: Choices) -> None:
        """Record; what one request's text or tokens raise ends that request alone."""
        try:
            self._record(item, choices)
        except Exception as error:
            if item.sequence.request_id not in self._active:
                raise
            logger.exception("recording a turn of request %d failed", item.sequence.request_id)
            self._fail([item.sequence], error)

    def _record(self, item: Scheduled, choices: Choices) -> None:
        """Note what a turn did for one request, and send what came out."""
        active = self._active[item.sequence.request_id]
        if item not in choices:
            self.scheduler.advance(item, [])
            return
        chosen = choices[item]
        if chosen is None:
            text = "the logits are not finite; run this model in float32 or bfloat16"
            self._fail([item.sequence], ModelError(text))
            return
        tokens = verified(item.drafts, chosen)
        chunk = active.take(tokens, num_accepted=len(tokens) - 1)
        self.scheduler.advance(item, list(chunk.token_ids))
        self.generated_tokens += len(chunk.token_ids)
        self.accepted_draft_tokens += chunk.num_accepted
        if chunk.finish_reason is not None:
            self._end(active)
        if not active.channel.put(chunk):
            self.abort(active)

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        for sequence in sequences:
            active = self._active[sequence.request_id]
            self._end(active)
            failure = ModelError(f"this request failed in the engine: {error}")
            failure.__cause__ = error
            active.channel.put(failure)

    def _end(self, active: ActiveRequest) -> None:
        sequence = active.sequence
        del self._active[sequence.request_id]
        slots = self.scheduler.drop(sequence)
        if self._connector is not None and slots:
            slots = self._connector.finished(sequence, slots)
        self._pool.release(slots)
