"""TensorRT-LLM's KV cache connector interface, by name and meaning, without importing it.

The names, fields and call order are those of `tensorrt_llm._torch.pyexecutor` 1.2
(`kv_cache_connector.py`), so that one pair of connector classes serves TensorRT-LLM and the
embedded engine. Differences between versions are read defensively where they matter.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class ConnectorRequest(Protocol):
    """What a connector reads of an engine's request (`LlmRequest` in TensorRT-LLM).

    Optional attributes are read with `getattr`: `cache_salt` (str), `cache_salt_id` (int),
    `lora_task_id` (int), `multimodal_hashes`; and of our own engine `hash_chain`, the
    `BlockHashChain` of its tokens in its scope.
    """

    @property
    def request_id(self) -> int:
        """Unique among the requests of this engine."""

    def get_tokens(self, beam: int) -> list[int]:
        """All token ids so far, prompt first."""


@dataclass(slots=True)
class RequestData:
    """What one engine turn tells of one request.

    `new_tokens` and `new_block_ids` are those not reported before. With a synchronous load the
    first report's `computed_position` is the number of tokens found on the device; afterwards it is
    the number of tokens whose KV is valid before this turn. `num_scheduled_tokens` tokens are
    computed in this turn's forward pass.
    """

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


@dataclass(slots=True)
class SchedulerOutput:
    """The requests of one engine turn: those reported for the first time, and the others."""

    new_requests: list[RequestData] = field(default_factory=list)
    cached_requests: list[RequestData] = field(default_factory=list)


class KvCacheConnectorScheduler(Protocol):
    """The scheduler side, one per engine (rank 0). No callback may raise into the engine."""

    def get_num_new_matched_tokens(
        self, request: ConnectorRequest, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens that can be loaded beyond those on the device, and whether asynchronously."""

    def update_state_after_alloc(self, request: ConnectorRequest, block_ids: list[int]) -> None:
        """The engine's block ids for all prompt blocks of this request."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object:
        """What the workers are to do in this turn; picklable and small."""

    def request_finished(self, request: ConnectorRequest, cache_block_ids: list[int]) -> bool:
        """True when blocks must outlive the request until `get_finished` names it."""


class KvCacheConnectorWorker(Protocol):
    """The worker side, one per rank. `stream` is a CUDA stream, or None on a CPU."""

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """The pool: `[num_blocks, ...]`, each block contiguous; called once, at start."""

    def bind_connector_meta(self, metadata: object) -> None:
        """This turn's result of `build_connector_meta`."""

    def start_load_kv(self, stream: Any) -> None:
        """Make this turn's loads happen before the forward pass on `stream`."""

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Called before each layer where layer hooks are on."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Called after each layer where layer hooks are on."""

    def wait_for_save(self, stream: Any) -> None:
        """Called after the forward pass was launched on `stream`."""

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Ids whose asynchronous saves and loads are done."""
