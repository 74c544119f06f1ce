"""A replica's settings -> keyword arguments of TensorRT-LLM's `LLM(...)`. Pure.

`engine.llm_args` is passed on as it is. What is refused here would start and then go wrong: a
keyword that one of our own settings decides, and what upstream does not check in 1.2.
"""

from collections.abc import Mapping
from typing import Any

from actors.config import EngineConfig, ReplicaConfig
from actors.engines.trtllm.api import TrtllmApi
from shared_cache.connector.trtllm_refusals import foreign_weights
from shared_cache.errors import ConfigError

CONNECTOR_MODULE = "shared_cache.connector.tensorrt_llm"
EVENT_BUFFER_SIZE = 16384
MAX_STATS = 10_000

OURS = {
    "model": "model",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "dtype": "engine.dtype",
    "max_batch_size": "engine.max_batch_size",
    "max_num_tokens": "engine.max_num_tokens",
    "max_seq_len": "engine.max_seq_len",
    "disable_overlap_scheduler": "engine.disable_overlap_scheduler",
    "kv_connector_config": "cache",
}
"""Keywords that our settings decide, and those settings."""

OURS_OF_KV = {
    "tokens_per_block": "engine.kv_cache_config.tokens_per_block",
    "max_tokens": "engine.kv_cache_config.max_tokens",
    "free_gpu_memory_fraction": "engine.kv_cache_config.free_gpu_memory_fraction",
    "enable_block_reuse": "engine.kv_cache_config.enable_block_reuse",
    "host_cache_size": "engine.kv_cache_config.host_cache_size",
}


def llm_arguments(config: ReplicaConfig, api: TrtllmApi) -> dict[str, Any]:
    """The arguments of `LLM(...)` for this replica; raises `ConfigError` with the fix."""
    engine = config.engine
    further = dict(engine.llm_args)
    _refuse(further, OURS, "engine.llm_args")
    _refuse_orchestrator(further)
    kv_further = further.pop("kv_cache_config", {})
    if not isinstance(kv_further, Mapping):
        raise ConfigError("engine.llm_args.kv_cache_config must hold settings, or be removed")
    _refuse(kv_further, OURS_OF_KV, "engine.llm_args.kv_cache_config")
    arguments: dict[str, Any] = {
        "model": config.model.path,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "dtype": engine.dtype,
        "max_batch_size": engine.max_batch_size,
        "max_num_tokens": engine.max_num_tokens,
        "enable_chunked_prefill": True,
        "enable_iter_perf_stats": True,
        "max_stats_len": MAX_STATS,
        "kv_cache_config": _made(api.kv_cache_config, _kv_arguments(config, kv_further, api)),
    }
    if engine.max_seq_len is not None:
        arguments["max_seq_len"] = engine.max_seq_len
    if engine.disable_overlap_scheduler:
        arguments["disable_overlap_scheduler"] = True
    return {**arguments, **_mode_arguments(config, api), **further}


def _kv_arguments(
    config: ReplicaConfig, further: Mapping[str, Any], api: TrtllmApi
) -> dict[str, Any]:
    kv = config.engine.kv_cache_config
    arguments: dict[str, Any] = {
        "tokens_per_block": kv.tokens_per_block,
        "enable_block_reuse": kv.enable_block_reuse,
        "enable_partial_reuse": False,  # a prefix is whole blocks, on the device and elsewhere
        "event_buffer_max_size": EVENT_BUFFER_SIZE if kv.enable_block_reuse else 0,
    }
    if kv.max_tokens is not None:
        arguments["max_tokens"] = kv.max_tokens
    if kv.free_gpu_memory_fraction is not None:
        arguments["free_gpu_memory_fraction"] = kv.free_gpu_memory_fraction
    if kv.host_cache_size is not None:
        arguments["host_cache_size"] = int(kv.host_cache_size)
    elif config.trtllm_mode == "shared":
        arguments["host_cache_size"] = 0  # versions that make a host tier by themselves: not here
        if "use_kv_cache_manager_v2" in api.kv_cache_fields():
            arguments["use_kv_cache_manager_v2"] = False
    return {**arguments, **further}


def _mode_arguments(config: ReplicaConfig, api: TrtllmApi) -> dict[str, Any]:
    engine = config.engine
    if config.trtllm_mode == "shared":
        _check_shared(engine)
        connector = {
            "connector_module": CONNECTOR_MODULE,
            "connector_scheduler_class": "SharedCacheScheduler",
            "connector_worker_class": "SharedCacheWorker",
        }
        return {"kv_connector_config": _made(api.connector_config, connector)}
    drafts = engine.speculative_config
    if drafts is None:
        return {}
    arguments = {
        "max_draft_len": drafts.max_draft_len,
        "max_matching_ngram_size": drafts.max_matching_ngram_size,
    }
    # The overlap scheduler cannot draft n-grams; upstream would warn and switch it off.
    return {
        "speculative_config": _made(api.ngram_config, arguments),
        "disable_overlap_scheduler": True,
    }


def _check_shared(engine: EngineConfig) -> None:
    kv_further = engine.llm_args.get("kv_cache_config", {})
    if not engine.kv_cache_config.enable_block_reuse:
        raise ConfigError(
            "engine.kv_cache_config.enable_block_reuse is off, so TensorRT-LLM would never ask the "
            "cache; switch it on, or remove cache"
        )
    if kv_further.get("enable_partial_reuse"):
        raise ConfigError(
            "engine.llm_args.kv_cache_config.enable_partial_reuse makes matches end inside blocks, "
            "where nothing can be loaded; remove it, or remove cache"
        )
    for problem in foreign_weights(engine.llm_args):
        raise ConfigError(
            f"engine.llm_args.{problem}, and blocks would be named after the model's files; remove "
            "it, or remove cache"
        )


def _refuse_orchestrator(further: Mapping[str, Any]) -> None:
    if further.get("orchestrator_type") == "ray":
        raise ConfigError(
            "engine.llm_args.orchestrator_type: ray makes workers that wait for GPUs which this "
            "replica has reserved already, and with several ranks its connector gets no plans; "
            "remove it: one rank runs in the replica's process, several are started by MPI"
        )


def _refuse(given: Mapping[str, Any], ours: Mapping[str, str], where: str) -> None:
    for name in ours:
        if name in given:
            raise ConfigError(f"{where}.{name} is decided by {ours[name]}; set that, remove this")


def _made(settings: Any, arguments: Mapping[str, Any]) -> Any:
    """An object of one of TensorRT-LLM's settings classes; what it refuses is a `ConfigError`."""
    try:
        return settings(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"this version of TensorRT-LLM refuses its {settings.__name__}: {error}; correct "
            "engine.llm_args.kv_cache_config, or take a version that docs/tensorrt-llm.md names"
        ) from error
