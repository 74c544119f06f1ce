"""A model's folder from the environment; everything here needs TensorRT-LLM and a GPU."""

import importlib.util
import os
from pathlib import Path

import pytest

from actors.config import EngineConfig, KvCacheConfig, ReplicaConfig
from cluster.models import resolve_model

MODEL_VARIABLE = "KVCOMMONS_TRTLLM_MODEL"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("tensorrt_llm") is not None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="tensorrt_llm is not installed"))


@pytest.fixture(scope="session")
def model() -> str:
    named = os.environ.get(MODEL_VARIABLE)
    if not named:
        pytest.skip(f"{MODEL_VARIABLE} names no model's folder")
    return named


@pytest.fixture
def config(model: str) -> ReplicaConfig:
    """A small engine of one rank; `max_tokens` keeps the pool small on any GPU."""
    kv = KvCacheConfig(tokens_per_block=32, max_tokens=16384, free_gpu_memory_fraction=0.5)
    engine = EngineConfig(kind="trtllm", max_num_tokens=2048, max_seq_len=4096, kv_cache_config=kv)
    return ReplicaConfig(name="gpu", model=resolve_model(model), engine=engine)
