"""Decide, launch, record: what the engine's thread does in one turn.

Where passes can run ahead, a turn is decided and launched while the pass before it is running on
the device, and what that one chose is recorded then: the device need not wait for the host. A
request may have ended meanwhile: what the launched pass computes for it is void, in slots that
nothing writes to before that pass is through.

A forward pass that fails takes the requests in it with it, and no other: their slots come back and
the engine goes on.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from actors.engine import TokenChunk
from actors.engines.channel import Channel, put_all
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.request import ActiveRequest
from actors.engines.torch.runner import Choices, LaunchedPass, Runner, Sampler
from actors.engines.torch.scheduled import Scheduled, Turn, verified
from actors.engines.torch.scheduler import Limits, Scheduler
from actors.engines.torch.sequence import Sequence
from actors.engines.torch.slots import SlotPool
from shared_cache.errors import ModelError

logger = logging.getLogger(__name__)


class TurnLoop:
    """The requests of one engine and the turns that serve them.

    All methods are for the engine's thread; the public counters may be read from any.
    """

    def __init__(
        self,
        runner: Runner,
        pool: SlotPool,
        limits: Limits,
        connector: ConnectorDriver | None,
        *,
        overlap: bool = True,
    ) -> None:
        """`overlap`: let passes run ahead, where `runner` can."""
        self.scheduler = Scheduler(pool, limits, self._match, self._allocated)
        self.num_turns = 0
        self.prefill_tokens = 0
        self.generated_tokens = 0
        self.accepted_draft_tokens = 0
        self.proposed_draft_tokens = 0
        self._runner = runner
        self._pool = pool
        self._connector = connector
        self._overlaps = overlap and runner.runs_ahead
        self._launched: LaunchedPass | None = None
        self._active: dict[int, ActiveRequest] = {}
        self._refused: dict[Sequence, Exception] = {}
        self._unsent: list[tuple[Channel, TokenChunk | Exception]] = []

    @property
    def is_loading(self) -> bool:
        """True while a request waits for its load."""
        return self._connector is not None and self._connector.is_loading

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs, or has left something to save."""
        return bool(self._active) or self.is_holding

    @property
    def is_holding(self) -> bool:
        """True while ended requests have left something to save."""
        return self._connector is not None and self._connector.is_holding

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
        put_all([*self._unsent, *((active.channel, last) for active in self._active.values())])
        for active in list(self._active.values()):
            self._end(active)

    def turn(self) -> bool:
        """Serve one turn; False when nothing could run."""
        turn = self._decide()
        ran = turn.is_told or self._launched is not None
        if self._launched is not None and turn.items and not self._runner.is_quick(turn):
            self._record_launched()  # its tokens need not wait for a long launch
            turn = self._of_active(turn)
        launched = self._launch(turn) if turn or self.is_holding else None
        self._record_launched()
        self._launched = launched
        if launched is not None and not (self._active and self._may_run_ahead_of(launched)):
            self._record_launched()
        self._send()
        if self._connector is not None:
            self._pool.release(self._connector.end_turn())
            ran |= self._connector.has_loaded  # somebody may be computed now
        return ran

    def _decide(self) -> Turn:
        turn = self.scheduler.decide()
        if not self._refused:
            return turn
        refused, self._refused = self._refused, {}
        for sequence, error in refused.items():
            self._fail([sequence], error)
        return self._of_active(turn)

    def _of_active(self, turn: Turn) -> Turn:
        """`turn` without requests that have ended since it was decided."""
        return replace(
            turn,
            items=tuple(item for item in turn.items if self._is_active(item.sequence)),
            parked=tuple(sequence for sequence in turn.parked if self._is_active(sequence)),
            ending=tuple(sequence for sequence in turn.ending if self._is_active(sequence)),
            arrived=tuple(sequence for sequence in turn.arrived if self._is_active(sequence)),
        )

    def _is_active(self, sequence: Sequence) -> bool:
        return sequence.request_id in self._active

    def _launch(self, turn: Turn) -> LaunchedPass | None:
        self._start(turn)
        try:
            launched = self._runner.launch(turn, self._samplers())
        except Exception as error:  # whatever a model, a device or a connector may raise
            logger.exception("a turn with %d requests failed", len(turn.sequences))
            self._record_launched()  # what the pass before it chose is not lost with it
            self._fail(self._of_active(turn).sequences, error)
            return None
        for item in turn.items:
            self.scheduler.launched(item)
        for sequence in turn.arrived:
            self.scheduler.arrived(sequence)
            active = self._active[sequence.request_id]
            self._end(active)
            self._unsent.append((active.channel, TokenChunk((), "", finish_reason="stop")))
        return launched

    def _may_run_ahead_of(self, launched: LaunchedPass) -> bool:
        """Whether the next turn can be decided before it is known what `launched` chose.

        It cannot where the host chooses itself, or drafts what comes next.
        """
        return self._overlaps and not any(
            item.sequence.lookup is not None or item.sequence.request_id in launched.samplers
            for item in launched.items
        )

    def _record_launched(self) -> None:
        """Wait for the pass that was launched, and record what it did for whoever is still here."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        try:
            choices = launched.choices()
        except Exception as error:  # it failed on the device
            sequences = [item.sequence for item in launched.items]
            logger.exception("a forward pass with %d requests failed", len(sequences))
            self._fail([one for one in sequences if self._is_active(one)], error)
            return
        for item in launched.items:
            if self._is_active(item.sequence):
                self._record_or_fail(item, choices)
        self._send()

    def _send(self) -> None:
        """Send all that has come out; who is not there any more to read it is aborted."""
        unsent, self._unsent = self._unsent, []
        unread = put_all(unsent)
        for active in list(self._active.values()) if unread else ():
            if active.channel in unread:
                self.abort(active)

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
        for sequence in (*(item.sequence for item in turn.items), *turn.parked):
            active = self._active[sequence.request_id]
            if active.started_s is None:
                active.started_s = now
        for item in turn.items:
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
        self._unsent.append((active.channel, chunk))

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        for sequence in sequences:
            active = self._active[sequence.request_id]
            self._end(active)
            failure = ModelError(f"this request failed in the engine: {error}")
            failure.__cause__ = error
            self._unsent.append((active.channel, failure))

    def _end(self, active: ActiveRequest) -> None:
        sequence = active.sequence
        del self._active[sequence.request_id]
        slots = self.scheduler.drop(sequence)
        if self._connector is not None and slots:
            slots = self._connector.finished(sequence, slots)
        self._pool.release(slots)
