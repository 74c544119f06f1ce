"""Our connector with a diary: which callback came when, on which thread, with what.

For engines in the test's own process. TensorRT-LLM finds the classes by this module's name.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

from shared_cache.connector.tensorrt_llm import SharedCacheScheduler, SharedCacheWorker


@dataclass(frozen=True, slots=True)
class Entry:
    """One callback; `turn` counts the plans that were built before it."""

    turn: int
    method: str
    told: str
    thread: str


DIARY: list[Entry] = []
_turns = [0]


def note(method: str, told: object = "") -> None:
    """Add to the diary."""
    thread = f"{os.getpid()}/{threading.current_thread().name}"
    DIARY.append(Entry(_turns[0], method, str(told), thread))


def methods() -> list[str]:
    """The callbacks so far, in order."""
    return [entry.method for entry in DIARY]


class RecordingScheduler(SharedCacheScheduler):
    """The scheduler side, recorded."""

    def __init__(self, llm_args: Any) -> None:
        note("scheduler", os.environ.get("TLLM_SHARED_CACHE_CONFIG"))
        super().__init__(llm_args)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """See the base class."""
        answer = super().get_num_new_matched_tokens(request, num_computed_tokens)
        note("match", f"{request.request_id} device {num_computed_tokens} answer {answer}")
        return answer

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """See the base class."""
        note("alloc", f"{request.request_id} {len(block_ids)} blocks")
        super().update_state_after_alloc(request, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """See the base class."""
        _turns[0] += 1
        note("build", scheduler_output)
        return super().build_connector_meta(scheduler_output)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """See the base class."""
        note("finished", f"{request.request_id} {len(cache_block_ids)} blocks")
        return super().request_finished(request, cache_block_ids)


class RecordingWorker(SharedCacheWorker):
    """The worker side, recorded."""

    def __init__(self, llm_args: Any) -> None:
        import torch

        note("worker", f"current device {torch.cuda.current_device()}")
        super().__init__(llm_args)

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        """See the base class."""
        shape, stride = tuple(kv_cache_tensor.shape), kv_cache_tensor.stride()
        note("register", f"{shape} {stride} {kv_cache_tensor.dtype} {kv_cache_tensor.device}")
        super().register_kv_caches(kv_cache_tensor)

    def start_load_kv(self, stream: Any) -> None:
        """See the base class."""
        note("load", stream)
        super().start_load_kv(stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """See the base class."""
        note("before layer", layer_idx)
        super().wait_for_layer_load(layer_idx, stream)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """See the base class."""
        note("after layer", layer_idx)
        super().save_kv_layer(layer_idx, stream)

    def wait_for_save(self, stream: Any) -> None:
        """See the base class."""
        note("save", stream)
        super().wait_for_save(stream)

    def get_finished(self, saving: list[int], loading: list[int]) -> Any:
        """See the base class."""
        note("poll", f"saving {saving} loading {loading}")
        return super().get_finished(saving, loading)
