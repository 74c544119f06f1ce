"""The set-ups that the scenarios compare, each made from the user's own configuration.

A scenario changes only what it is about (pool, reuse, cache, router, drafts) and keeps the rest:
model, device, dtype, threads, block size. So the demo shows the user's engine and no special one.
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from actors.config import EngineConfig, ModelSource
from cluster.config import ClusterConfig
from shared_cache.config import DEFAULT_ARENA, CacheConfig
from shared_cache.namespace import DTYPE_BYTES

Changes = Mapping[str, Any]


def setup(config: ClusterConfig, what: str, replicas: int, **changes: Any) -> ClusterConfig:
    """`config` with `changes`, validated anew, under a name of its own.

    Nested mappings change only the settings that they name.
    """
    values = _merged(config.model_dump(), changes)
    values["name"] = f"demo-{what}-{uuid.uuid4().hex[:6]}"
    values["replicas"] = replicas
    values["doctor"] = {"period_s": None}  # canaries would count in what is measured
    if values["cache"]:  # its own arena, not that of a cluster that serves
        values["cache"]["host"]["name"] = DEFAULT_ARENA
    return ClusterConfig.model_validate(values)


def _merged(values: Changes, changes: Changes) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        both = isinstance(change, Mapping) and isinstance(old, Mapping)
        merged[key] = _merged(old, change) if both else change  # type: ignore[arg-type]
    return merged


def kv_cache_bytes(model: ModelSource, engine: EngineConfig, num_tokens: int) -> int:
    """Bytes of the KV of `num_tokens` tokens, all layers and heads."""
    config = json.loads((Path(model.path) / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = 2 * config["num_hidden_layers"] * kv_heads * head_dim
    return int(num_tokens * values * DTYPE_BYTES[engine.torch_dtype])


def roomy_pool(config: ClusterConfig, num_tokens: int) -> dict[str, Any]:
    """The user's pool, made large enough for a request of `num_tokens`, with block reuse."""
    kv = config.engine.kv_cache_config
    needed = num_tokens + kv.tokens_per_block
    return {
        "max_tokens": max(kv.pool_tokens, needed),
        "enable_block_reuse": True,
        "host_cache_size": None,
    }


def fresh_cache(config: ClusterConfig, store: Path, reserve_bytes: int) -> CacheConfig:
    """A cache on the empty folder `store`, with the user's settings where there are any.

    Host memory and save queue hold at least `reserve_bytes`: a save that is dropped for want of
    room is right for a server and confusing in a demonstration.
    """
    base = config.cache or CacheConfig()
    host = {"bytes": ByteSize(max(base.host.bytes, reserve_bytes))}
    return base.model_copy(
        update={
            "store": f"file://{store}",
            "tiers": (),
            "host": base.host.model_copy(update=host),
            "save_queue_bytes": ByteSize(max(base.save_queue_bytes, reserve_bytes)),
        }
    )
