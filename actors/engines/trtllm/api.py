"""The engine's door to `tensorrt_llm`: what serves requests has it from here alone.

Names moved between its versions, and its settings classes refuse fields of other versions. So every
name is looked up here, old places after new ones, and what this version's classes take is asked of
them instead of being assumed from a version number. Never run on TensorRT-LLM: written from the
sources of 1.2 and its neighbours.
"""

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from shared_cache.errors import ConfigError

_SALT_PLACES = ("tensorrt_llm.inputs.utils", "tensorrt_llm.inputs")
_SALT_BYTES = 8


@dataclass(frozen=True, slots=True)
class TrtllmApi:
    """What the engine uses of TensorRT-LLM."""

    version: str
    llm: Callable[..., Any]
    sampling_params: Callable[..., Any]
    kv_cache_config: Any
    ngram_config: Any
    connector_config: Any
    salt_id: Callable[[str], int]

    def kv_cache_fields(self) -> Collection[str]:
        """The fields that this version's `KvCacheConfig` takes."""
        return tuple(getattr(self.kv_cache_config, "model_fields", ()))


def load_api() -> TrtllmApi:
    """TensorRT-LLM as it is installed here; `ConfigError` when it is not, or lacks a name."""
    try:
        top = importlib.import_module("tensorrt_llm")
        llmapi = importlib.import_module("tensorrt_llm.llmapi")
        llm_args = importlib.import_module("tensorrt_llm.llmapi.llm_args")
        return TrtllmApi(
            version=str(top.__version__),
            llm=top.LLM,
            sampling_params=top.SamplingParams,
            kv_cache_config=llmapi.KvCacheConfig,
            ngram_config=llmapi.NGramDecodingConfig,
            connector_config=llm_args.KvCacheConnectorConfig,
            salt_id=_salt_id(),
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine.kind is trtllm, but {error.name} is not installed here; run in NVIDIA's "
            "TensorRT-LLM container (docs/tensorrt-llm.md), or set kind: torch"
        ) from error
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(
            f"TensorRT-LLM is installed but cannot be used here: {error}; versions from 1.2 on "
            "work, and a missing library means that the container has no access to a GPU driver "
            "(docker run --gpus all)"
        ) from error


def _salt_id() -> Callable[[str], int]:
    """How this version makes the number that it calls `cache_salt_id` of a salt."""
    for place in _SALT_PLACES:
        try:
            found = getattr(importlib.import_module(place), "get_cache_salt_id", None)
        except ImportError:
            continue
        if found is not None:
            return found  # type: ignore[no-any-return]
    return _salt_id_by_rule(importlib.import_module("blake3").blake3)


def _salt_id_by_rule(blake3: Callable[[bytes], Any]) -> Callable[[str], int]:
    """The same number by upstream's rule, for versions that keep their function elsewhere."""

    def salt_id(salt: str) -> int:
        digest = blake3(salt.encode()).digest(length=_SALT_BYTES)
        return int.from_bytes(digest, "little")

    return salt_id
