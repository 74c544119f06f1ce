"""What an engine is, as far as its blocks are concerned: from its settings to its namespaces.

Two engines share a block only where everything that decides its bytes is equal: weights, numbers,
layout, shard, engine. What cannot be told for sure is an error at start, never a guess: a wrong
guess is another engine's bytes in this one's attention. Pure: no torch, no TensorRT-LLM.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shared_cache.connector.trtllm_config import ConnectorConfig
from shared_cache.connector.trtllm_layout import (
    KvTerms,
    is_multimodal,
    predict_layout,
    problems_of_model,
)
from shared_cache.connector.trtllm_refusals import foreign_weights, problems_of, warnings_of
from shared_cache.connector.trtllm_values import read, release_of, text
from shared_cache.errors import ConfigError
from shared_cache.namespace import BlockLayout, Namespace


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the process knows and its settings do not: version, rank, environment variables."""

    version: str
    mpi_rank: int
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The JSON files of a model's folder that decide how its KV cache looks; empty: not there."""

    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any]
    quant_cfg: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine, as one of its ranks has it. `namespace` is that of rank 0."""

    namespace: Namespace
    tp_rank: int
    max_num_tokens: int
    warnings: tuple[str, ...] = ()

    @property
    def layout(self) -> BlockLayout:
        """One block of one rank's pool."""
        return self.namespace.layout

    @property
    def tp_size(self) -> int:
        """Ranks, so shards of every block."""
        return self.namespace.tp_size

    def namespace_of(self, tp_rank: int) -> Namespace:
        """The namespace of one rank's shards."""
        return replace(self.namespace, tp_rank=tp_rank)


def check_engine(llm_args: Any, config: ConnectorConfig, runtime: Runtime) -> None:
    """Raises `ConfigError` that lists everything in the settings that excludes the connector."""
    problems = problems_of(llm_args, runtime.environment)
    if read(llm_args, "kv_cache_config.tokens_per_block") is None:
        problems.append("kv_cache_config.tokens_per_block is not set; set it, for example to 32")
    if config.revision is None:
        problems += [
            f"{problem}, so the model's files do not tell which ones; if all engines that share "
            "this store agree on a name for these weights, set revision in the connector's YAML, "
            "else remove the setting"
            for problem in foreign_weights(llm_args)
        ]
    if _has_lora(llm_args) and not config.trust_lora_ids:
        problems.append(
            "the engine has LoRA: blocks are told apart by the adapter's number alone, and another "
            "engine may give the same number to another adapter; where all engines that share this "
            "store agree on the numbers, set trust_lora_ids: true in the connector's YAML"
        )
    if config.host.scope == "process" and read(llm_args, "tensor_parallel_size", 1) > 1:
        problems.append(
            "host.scope: process is memory of one rank alone, and rank 0 brings the blocks of all; "
            "write scope: node"
        )
    _raise(problems)


def facts_of(
    llm_args: Any,
    files: ModelFiles,
    revision: str,
    config: ConnectorConfig,
    runtime: Runtime,
) -> EngineFacts:
    """The facts of an engine that passed `check_engine`.

    `revision` identifies the weights in its model's folder. Raises `ConfigError` for a model whose
    cache cannot be saved whole, or whose layout cannot be told.
    """
    _raise(problems_of_model(files.config))
    tp_rank, tp_size = _ranks(llm_args, runtime)
    size = int(read(llm_args, "kv_cache_config.tokens_per_block"))
    weights, cache = quantization_of(llm_args, files)
    terms = KvTerms(size, tp_size, cache)
    namespace = Namespace(
        model=config.model or model_name(files.config),
        revision=_revision(llm_args, revision),
        engine=f"tensorrt_llm-{release_of(runtime.version)}",
        layout=predict_layout(files.config, terms, config.kv_layout),
        quantization=f"{weights}+kv-{cache}",
        tp_size=tp_size,
    )
    warnings = warnings_of(llm_args)
    if is_multimodal(files.config):
        warnings.append("the model takes images or sound: requests with such are computed whole")
    max_num_tokens = int(read(llm_args, "max_num_tokens", 8192))
    return EngineFacts(namespace, tp_rank, max_num_tokens, tuple(warnings))


def model_name(config: Mapping[str, Any]) -> str:
    """A name for people that is the same wherever the model lies: its architecture."""
    architectures = config.get("architectures") or ()
    return str(next(iter(architectures), config.get("model_type", "model")))


def quantization_of(llm_args: Any, files: ModelFiles) -> tuple[str, str]:
    """How weights and KV cache are quantised: (algorithm or `none`, KV dtype or `auto`).

    The checkpoint's files come first: they are the same in all processes, while TensorRT-LLM
    carries what they say into its settings in some processes only.
    """
    listed = files.hf_quant_config.get("quantization", files.hf_quant_config)
    inline = files.config.get("quantization_config") or {}
    weights = (
        text(listed.get("quant_algo"))
        or text(inline.get("quant_algo"))
        or text(inline.get("quant_method"))
        or text(read(llm_args, "quant_config.quant_algo"))
        or "none"
    )
    chosen = (text(read(llm_args, "kv_cache_config.dtype")) or "auto").lower()
    cache = (
        text(listed.get("kv_cache_quant_algo"))
        or text(files.quant_cfg.get("kv_cache_quant_algo"))
        or _inline_kv(inline)
        or text(read(llm_args, "quant_config.kv_cache_quant_algo"))
        or "auto"
    )
    cache = "auto" if cache.lower() in ("none", "no_quant") else cache.lower()
    return weights, (cache if chosen == "auto" else chosen)


def _inline_kv(inline: Mapping[str, Any]) -> str | None:
    """The KV dtype that `quantization_config` in config.json names, in either of its forms."""
    named = text(inline.get("kv_cache_quant_algo"))
    scheme = inline.get("kv_cache_scheme")
    if named or not isinstance(scheme, Mapping):
        return named
    return {8: "fp8", 4: "nvfp4"}.get(int(scheme.get("num_bits", 0)))


def _ranks(llm_args: Any, runtime: Runtime) -> tuple[int, int]:
    """(tensor-parallel rank, ranks), from the engine's mapping or else from MPI."""
    tp_size = int(read(llm_args, "tensor_parallel_size", 1))
    to_mapping = read(llm_args, "parallel_config.to_mapping")
    mapping = to_mapping() if callable(to_mapping) else None
    tp_rank = 0 if tp_size == 1 else int(read(mapping, "tp_rank", runtime.mpi_rank))
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(
            f"this process is rank {tp_rank}, and tensor_parallel_size is {tp_size}: start "
            "TensorRT-LLM with as many MPI ranks as the engine has GPUs"
        )
    return tp_rank, tp_size


def _revision(llm_args: Any, revision: str) -> str:
    """`revision`, marked where the engine's weights are not those of the files."""
    if (text(read(llm_args, "load_format")) or "auto").lower() == "dummy":
        revision = f"dummy-{revision}"
    changed = read(llm_args, "model_kwargs")
    if changed:
        told = json.dumps(changed, sort_keys=True, default=str).encode()
        revision = f"{revision}-{hashlib.sha256(told).hexdigest()[:16]}"
    return revision


def _has_lora(llm_args: Any) -> bool:
    return bool(read(llm_args, "enable_lora", False) or read(llm_args, "lora_config") is not None)


def _raise(problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"the shared cache cannot serve this engine:\n{listed}")
