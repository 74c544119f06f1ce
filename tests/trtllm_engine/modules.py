"""`tensorrt_llm` as far as the engine imports it, put in its place for a test."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from tests.trtllm_engine.llm import FakeLLM
from tests.trtllm_runtime.requests import salt_id_of


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KvCacheConfig(Strict):
    """The fields of a version of late 2025."""

    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float | None = 0.9
    host_cache_size: int | None = None
    onboard_blocks: bool = True
    event_buffer_max_size: int = 0
    secondary_offload_min_priority: int | None = None
    dtype: str = "auto"
    tokens_per_block: int = 32


class LaterKvCacheConfig(KvCacheConfig):
    """One that has the second manager."""

    use_kv_cache_manager_v2: bool | None = None


class NGramDecodingConfig(Strict):
    max_draft_len: int
    max_matching_ngram_size: int = 0
    is_keep_all: bool = True


class KvCacheConnectorConfig(Strict):
    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str


@dataclass(kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True


class ConnectorBase:
    """Both of upstream's base classes, as far as a constructor goes."""

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args


class SchedulerBase(ConnectorBase):
    pass


class WorkerBase(ConnectorBase):
    pass


ADAPTERS = "shared_cache.connector.tensorrt_llm"
CONNECTOR = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"


def install(
    patch: pytest.MonkeyPatch,
    kv: Any = KvCacheConfig,
    version: str = "1.2.1",
    llm: type[FakeLLM] = FakeLLM,
) -> None:
    """Let `import tensorrt_llm` find the double; our adapters are imported on it anew."""
    parts: dict[str, dict[str, Any]] = {
        "tensorrt_llm": {
            "__version__": version,
            "LLM": llm,
            "SamplingParams": SamplingParams,
            "mpi_rank": lambda: 0,
        },
        "tensorrt_llm.llmapi": {"KvCacheConfig": kv, "NGramDecodingConfig": NGramDecodingConfig},
        "tensorrt_llm.llmapi.llm_args": {"KvCacheConnectorConfig": KvCacheConnectorConfig},
        "tensorrt_llm.inputs": {},
        "tensorrt_llm.inputs.utils": {"get_cache_salt_id": salt_id_of},
    }
    parts |= {CONNECTOR.rsplit(".", level)[0]: {} for level in (1, 2)}
    bases = {"KvCacheConnectorScheduler": SchedulerBase, "KvCacheConnectorWorker": WorkerBase}
    parts[CONNECTOR] = bases
    patch.delitem(sys.modules, ADAPTERS, raising=False)
    for name, contents in parts.items():
        patch.setitem(sys.modules, name, _module(name, contents.items()))


def _module(name: str, contents: Iterable[tuple[str, Any]]) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    for key, value in contents:
        setattr(module, key, value)
    return module
