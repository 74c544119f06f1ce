"""The connector's manager: one part per rank, rank 0 asks the scheduler, all work in lock-step.

Everything that TensorRT-LLM broadcasts goes through `pickle` here, so what cannot travel fails. An
asynchronous load or save counts only when every rank has reported it, and whoever reports an id
that was not handed in, or reports it twice, gets the `KeyError` that upstream's manager raises.
"""

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from shared_cache.connector.interface import SchedulerOutput
from tests.trtllm_runtime.reports import Batch, Reporter
from tests.trtllm_runtime.requests import (
    LaterLlmRequestBase,
    LlmRequest,
    LlmRequestBase,
    Request,
    State,
)

T = TypeVar("T")


class RankManager:
    """One rank's worker, and what it has begun and not yet reported."""

    def __init__(self, worker: Any, *, is_later: bool) -> None:
        self.worker = worker
        self.reporter = Reporter(is_later=is_later)
        self.new_saving: dict[int, Request] = {}
        self.new_loading: dict[int, Request] = {}
        self._saving: dict[int, Request] = {}
        self._loading: dict[int, Request] = {}
        self.done_saving: dict[int, Request] = {}
        self.done_loading: dict[int, Request] = {}

    def poll(self) -> None:
        """Ask the worker, once per turn; each id is handed in once and must come back once."""
        saving, loading = list(self.new_saving), list(self.new_loading)
        self._saving.update(self.new_saving)
        self._loading.update(self.new_loading)
        self.new_saving, self.new_loading = {}, {}
        saved, loaded = self.worker.get_finished(saving, loading)
        for ids, pending, done in (
            (saved, self._saving, self.done_saving),
            (loaded, self._loading, self.done_loading),
        ):
            for request_id in ids:
                done[request_id] = pending.pop(request_id)  # KeyError: unknown, or told twice

    @property
    def num_pending(self) -> int:
        """Asynchronous loads and saves that are not through."""
        return sum(
            map(
                len,
                (
                    self.new_saving,
                    self.new_loading,
                    self._saving,
                    self._loading,
                    self.done_saving,
                    self.done_loading,
                ),
            )
        )


class ConnectorManager:
    """All ranks' managers; `calls` counts callbacks, `log` has them in order."""

    def __init__(self, scheduler: Any, workers: Sequence[Any], *, is_later: bool = False) -> None:
        self.scheduler = scheduler
        self.ranks = [RankManager(worker, is_later=is_later) for worker in workers]
        self._base = LaterLlmRequestBase if is_later else LlmRequestBase
        self.resumed: dict[int, Request] = {}
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[str, Any]] = []
        self.outputs: list[SchedulerOutput] = []
        self.max_metadata_bytes = 0

    def match(self, request: Request, num_computed_tokens: int) -> int:
        """How many tokens rank 0's scheduler promises; parks the request on all ranks if it must.

        Raises as upstream does: for generation-only requests, and for (0, True).
        """
        if request.is_generation_only:
            raise RuntimeError("the connector does not support generation-only requests")
        answers = self._on_leader(
            "get_num_new_matched_tokens",
            lambda: self.scheduler.get_num_new_matched_tokens(
                self._base(request), num_computed_tokens
            ),
        )
        for rank, (num_tokens, is_async) in zip(self.ranks, answers, strict=True):
            if num_tokens == 0 and is_async:
                raise RuntimeError("load_kv_async must be False when num_tokens is 0")
            if is_async:
                rank.new_loading[request.request_id] = request
            rank.reporter.matched(request.request_id, num_tokens)
        return int(answers[0][0])

    def allocated(self, request: Request) -> None:
        """Rank 0 only, and its result is ignored."""
        blocks = list(request.blocks or [])
        self._note("update_state_after_alloc", blocks)
        self.scheduler.update_state_after_alloc(LlmRequest(request), blocks)

    def should_add_sequence(self, request: Request) -> bool:
        """False for a request that has its blocks already, as it was parked."""
        return request.request_id not in self.resumed

    def report(self, batch: Batch) -> None:
        """Every rank builds the turn's report; only rank 0's is used."""
        outputs = [rank.reporter.build(batch, set(rank.new_loading)) for rank in self.ranks]
        assert all(output == outputs[0] for output in outputs), "the ranks are out of step"
        self.outputs.append(outputs[0])

    def start_batch(self, batch: Batch, streams: Sequence[Any]) -> None:
        """Take parked requests out of the batch, hand out the metadata, start the loads."""
        parked = self.ranks[0].new_loading
        for request in batch.context:
            if request.request_id in parked:
                request.state = State.DISAGG_GENERATION_TRANS_IN_PROGRESS
        batch.context = [one for one in batch.context if one.request_id not in parked]
        output = self.outputs[-1]
        plans = self._on_leader(
            "build_connector_meta", lambda: self.scheduler.build_connector_meta(output)
        )
        self.max_metadata_bytes = max(self.max_metadata_bytes, len(pickle.dumps(plans[0])))
        for rank, plan, stream in zip(self.ranks, plans, streams, strict=True):
            rank.worker.bind_connector_meta(plan)
            rank.worker.start_load_kv(stream)
        self._note("start_load_kv", None)

    def wait_for_layer(self, layer: int, streams: Sequence[Any]) -> None:
        """The hook before a layer."""
        self._note("wait_for_layer_load", layer)
        for rank, stream in zip(self.ranks, streams, strict=True):
            rank.worker.wait_for_layer_load(layer, stream)

    def save_layer(self, layer: int, streams: Sequence[Any]) -> None:
        """The hook after a layer."""
        self._note("save_kv_layer", layer)
        for rank, stream in zip(self.ranks, streams, strict=True):
            rank.worker.save_kv_layer(layer, stream)

    def wait_for_save(self, streams: Sequence[Any]) -> None:
        """After the forward pass was launched."""
        self._note("wait_for_save", None)
        for rank, stream in zip(self.ranks, streams, strict=True):
            rank.worker.wait_for_save(stream)

    def finished(self, request: Request) -> bool:
        """Tell of the end of a request that has blocks; whether it saves asynchronously."""
        self.resumed.pop(request.request_id, None)
        blocks = list(request.blocks or [])
        answers = self._on_leader(
            "request_finished",
            lambda: self.scheduler.request_finished(LlmRequest(request), blocks),
        )
        for rank, is_async in zip(self.ranks, answers, strict=True):
            if is_async:
                rank.new_saving[request.request_id] = request
        if answers[0]:
            request.state = State.DISAGG_CONTEXT_TRANS_IN_PROGRESS
        return bool(answers[0])

    def poll(self) -> list[Request]:
        """Once per turn, always: requests whose saves are through on all ranks.

        Those whose loads are through on all ranks go back to their context phase.
        """
        self._note(
            "get_finished", (list(self.ranks[0].new_saving), list(self.ranks[0].new_loading))
        )
        for rank in self.ranks:
            rank.poll()
        for request in self._everywhere([rank.done_loading for rank in self.ranks]):
            if not request.is_finished:
                request.state = State.CONTEXT_INIT
                self.resumed[request.request_id] = request
        return self._everywhere([rank.done_saving for rank in self.ranks])

    @property
    def num_pending(self) -> int:
        """Asynchronous loads and saves that are not through, on all ranks."""
        return sum(rank.num_pending for rank in self.ranks)

    @staticmethod
    def _everywhere(done: Sequence[dict[int, Request]]) -> list[Request]:
        """Take out the requests that are in all of `done`, one per rank."""
        ids = set.intersection(*map(set, done))
        for of_rank in done[1:]:
            for request_id in ids:
                del of_rank[request_id]
        return [done[0].pop(request_id) for request_id in sorted(ids)]

    def _on_leader(self, name: str, call: Callable[[], T]) -> list[T]:
        """What rank 0 answers, as every rank receives it."""
        answer = call()
        self._note(name, answer)
        packed = pickle.dumps(answer)
        return [pickle.loads(packed) for _ in self.ranks]

    def _note(self, name: str, what: Any) -> None:
        self.calls[name] += 1
        self.log.append((name, what))
