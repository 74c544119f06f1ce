"""A connector whose answers a test decides, as upstream's tests use mocks."""

import threading
from collections.abc import Callable
from typing import Any

from shared_cache.connector.interface import SchedulerOutput
from tests.trtllm_runtime.executor import Executor
from tests.trtllm_runtime.pool import Pass
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import Rules


class ScriptedScheduler:
    """Answers what it is told to, and notes what it is asked."""

    def __init__(self) -> None:
        self.match: Callable[[Any, int], tuple[int, bool]] = lambda request, num_computed: (
            0,
            False,
        )
        self.saves_async = False
        self.thread = threading.current_thread()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        return self.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        pass

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object:
        return {"requests": len(scheduler_output.new_requests)}

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        return self.saves_async


class ScriptedWorker:
    """Loads nothing by itself: `on_load` and `on_poll` do what a test wants done."""

    def __init__(self) -> None:
        self.num_registered = 0
        self.metadata: list[object] = []
        self.polls: list[tuple[list[int], list[int]]] = []
        self.on_load: Callable[[], None] = lambda: None
        self.on_poll: Callable[[list[int], list[int]], Any] = lambda saving, loading: (
            saving,
            loading,
        )

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        self.num_registered += 1

    def bind_connector_meta(self, metadata: object) -> None:
        self.metadata.append(metadata)

    def start_load_kv(self, stream: Any) -> None:
        self.on_load()

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        pass

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        pass

    def wait_for_save(self, stream: Any) -> None:
        pass

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> Any:
        self.polls.append((finished_gen_req_ids, started_loading_req_ids))
        return self.on_poll(finished_gen_req_ids, started_loading_req_ids)


class Scripted:
    """An executor with a scripted connector on every rank."""

    def __init__(self, rules: Rules | None = None, tp_size: int = 1) -> None:
        self.scheduler = ScriptedScheduler()
        self.workers = [ScriptedWorker() for _ in range(tp_size)]
        self.executor = Executor(self.scheduler, self.workers, rules or Rules())
        self.calls = self.executor.manager.calls

    def load(self, request: Request) -> None:
        """Put what was promised of a request into every rank's pool."""
        assert request.blocks is not None
        stop = request.num_device_tokens + request.num_promised_tokens
        states = tuple(request.trail.states[:stop])
        part = Pass(request.request_id, tuple(request.blocks), states, stop, stop)
        for pool in self.executor.pools:
            pool._each(part, request.num_device_tokens, stop, pool._write)

    def outputs(self) -> list[SchedulerOutput]:
        """All reports so far."""
        return self.executor.manager.outputs
