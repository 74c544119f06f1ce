"""Drives a KV cache connector in TensorRT-LLM's call order, so the same classes serve both engines.

What a turn tells a connector is easy to get subtly wrong: the first report carries the whole prompt
although only a part is computed, later ones carry differences, and a draft that is not verified
must never be called valid. All of that is here and nowhere else.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from actors.engines.torch.scheduled import Scheduled, Turn
from actors.engines.torch.sequence import Sequence
from shared_cache.connector.interface import (
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    RequestData,
    SchedulerOutput,
)
from shared_cache.staging import SharedCache
from shared_cache.tiers import CLOSE_TIMEOUT_S

logger = logging.getLogger(__name__)

_CLOSE_S = 30.0
"""How long closing takes at most, should a store hang: writing what is queued, and stopping."""


class ConnectorDriver:
    """One connector pair and what it has been told. Used on the engine's thread only.

    Connectors do not raise by contract; when one does, it reaches the engine, which fails the
    requests concerned. `cache` is what the pair works on, closed with it.
    """

    def __init__(
        self,
        scheduler: KvCacheConnectorScheduler,
        worker: KvCacheConnectorWorker,
        cache: SharedCache | None = None,
    ) -> None:
        self.cache = cache
        self.has_loaded = False
        self._scheduler = scheduler
        self._worker = worker
        self._held: dict[int, list[int]] = {}
        self._newly_held: list[int] = []
        self._loading: dict[int, Sequence] = {}
        self._newly_loading: list[int] = []

    def match(self, sequence: Sequence) -> int:
        """Prompt tokens that will be loaded beyond those on the device: whole blocks, not all.

        Marks `sequence` as loading when it must not be computed before `end_turn` says so. Raises
        `ValueError` when the connector promises anything else.
        """
        on_device, block = sequence.num_device_tokens, sequence.chain.tokens_per_block
        num_tokens, is_async = self._scheduler.get_num_new_matched_tokens(sequence, on_device)
        most = sequence.num_reusable_blocks * block - on_device
        if num_tokens % block or not is_async <= num_tokens <= most:
            raise ValueError(
                f"the connector promised {num_tokens} tokens (asynchronous: {is_async}); this "
                f"engine loads multiples of {block}, here at most {most}"
            )
        if is_async:
            sequence.is_loading = True
            self._loading[sequence.request_id] = sequence
            self._newly_loading.append(sequence.request_id)
        return num_tokens

    def allocated(self, sequence: Sequence) -> None:
        """Tell the slots of the whole prompt."""
        self._scheduler.update_state_after_alloc(sequence, list(sequence.slots))

    def tell_when_loaded(self, wake: Callable[[], None]) -> bool:
        """Have `wake` called, by any thread, when a load is done; False if the worker cannot."""
        if not hasattr(self._worker, "on_loaded"):  # TensorRT-LLM's interface has no such thing
            return False
        self._worker.on_loaded = wake
        return True

    @property
    def is_loading(self) -> bool:
        """Whether a request waits for an asynchronous load."""
        return bool(self._loading)

    @property
    def is_holding(self) -> bool:
        """Whether ended requests hold slots that `end_turn` has not given back yet."""
        return bool(self._held)

    def begin_pass(self, turn: Turn, stream: Any) -> None:
        """Report the turn and start its loads; they are done before work put on `stream` later,
        but for asynchronous ones.
        """
        before_writes = getattr(self._worker, "before_writes", None)
        if before_writes is not None:  # TensorRT-LLM's interface has no such call
            before_writes(turn.taken_slots, stream)
        output = SchedulerOutput()
        for item in turn.items:
            is_new = not item.sequence.num_reported_tokens
            reports = output.new_requests if is_new else output.cached_requests
            reports.append(_report(item.sequence, item.start, item.num_tokens))
        for sequence in turn.ending:
            output.cached_requests.append(_report(sequence, sequence.num_launched, 1))
        for sequence in turn.arrived:
            output.new_requests.append(_report(sequence, sequence.num_launched, 0))
        self._worker.bind_connector_meta(self._scheduler.build_connector_meta(output))
        self._worker.start_load_kv(stream)

    def before_layer(self, layer: int, stream: Any) -> None:
        """Called before a layer's KV is used."""
        self._worker.wait_for_layer_load(layer, stream)

    def after_layer(self, layer: int, stream: Any) -> None:
        """Called after a layer's KV was written and used."""
        self._worker.save_kv_layer(layer, stream)

    def end_pass(self, stream: Any) -> None:
        """The forward pass was put on `stream`: save what it completes."""
        self._worker.wait_for_save(stream)

    def timed(self, items: tuple[Scheduled, ...], seconds: float) -> None:
        """What the model took for a turn, copies not counted: what computing costs.

        Turns that mix prompts and decoding tell neither.
        """
        num_decoding = sum(item.start >= item.sequence.num_prompt_tokens for item in items)
        if self.cache is None:
            return
        if not num_decoding:
            spans = [(item.start, item.num_tokens) for item in items]
            self.cache.gate.saw_prefill(spans, seconds)
        elif num_decoding == len(items):
            self.cache.turn_budget.saw_decode_turn(seconds)

    def finished(self, sequence: Sequence, slots: list[int]) -> list[int]:
        """End a request that had slots; those that may be released now, the others come later."""
        self._loading.pop(sequence.request_id, None)
        if not self._scheduler.request_finished(sequence, slots):
            return slots
        self._held[sequence.request_id] = slots
        self._newly_held.append(sequence.request_id)
        return []

    def end_turn(self) -> list[int]:
        """Poll what is asynchronous, once per turn; the slots that may be released now.

        Requests whose loads are done are no longer marked as loading; `has_loaded` says if any.
        """
        ended, self._newly_held = self._newly_held, []
        started, self._newly_loading = self._newly_loading, []
        saved, loaded = self._worker.get_finished(ended, started)
        for request_id in loaded:
            self._loading.pop(request_id).is_loading = False
        self.has_loaded = bool(loaded)
        return [slot for request_id in saved for slot in self._held.pop(request_id)]

    def close(self) -> None:
        """Let the worker finish, then write what is queued and close the cache."""
        close = getattr(self._worker, "close", None)  # TensorRT-LLM's interface has no such call
        if close is not None:
            close()
        if self.cache is None:
            return
        deadline_s = time.monotonic() + _CLOSE_S
        flush_s = _CLOSE_S - CLOSE_TIMEOUT_S
        if not self.cache.is_flush_hopeless and not self.cache.flush(flush_s):
            logger.warning("saves were still queued %g s after the end; dropped", flush_s)
        self.cache.close(min(CLOSE_TIMEOUT_S, max(0.0, deadline_s - time.monotonic())))


def _report(sequence: Sequence, start: int, num_tokens: int) -> RequestData:
    """What is new of this request, which computes `num_tokens` from `start` on; marks it as told.

    Drafts are not counted: their KV may have to go again. As in TensorRT-LLM, a token that is not
    known yet is not counted either, but the one before it, once more.
    """
    is_new = not sequence.num_reported_tokens
    report = RequestData(
        request_id=sequence.request_id,
        new_tokens=sequence.tokens[sequence.num_reported_tokens :],
        new_block_ids=sequence.slots[sequence.num_reported_slots :],
        computed_position=sequence.num_device_tokens if is_new else start - sequence.num_unknown,
        num_scheduled_tokens=num_tokens,
    )
    sequence.num_reported_tokens = len(sequence.tokens)
    sequence.num_reported_slots = len(sequence.slots)
    return report
