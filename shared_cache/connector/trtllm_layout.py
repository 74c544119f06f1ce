"""What a block of TensorRT-LLM's KV pool will look like, read from a model's configuration.

The scheduler side must name blocks, and other ranks' blocks, before any pool exists; waiting for
the pool would stop two constructors at each other. So the layout is predicted with TensorRT-LLM's
own rules, and compared with the pool when that is there (`pool_check`). Models whose cache is more
than one pool of equal blocks are refused: a part of them would never be saved. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared_cache.connector.trtllm_config import KvLayoutConfig
from shared_cache.errors import ConfigError
from shared_cache.namespace import DTYPE_BYTES, BlockLayout

FP8 = "float8_e4m3fn"
_FP8_NAMES = frozenset({"fp8", "float8", FP8})

STATE_FIELDS = (
    "hybrid_override_pattern",
    "layers_block_type",
    "full_attention_interval",
    "linear_num_value_heads",
    "linear_attn_config",
    "mamba_d_state",
    "mamba_num_heads",
    "ssm_state_size",
    "ssm_cfg",
)
"""Of models that keep, beside the KV cache or instead of it, a state that is no list of blocks."""


@dataclass(frozen=True, slots=True)
class KvTerms:
    """What the engine adds to the model: its own choices that shape a block."""

    tokens_per_block: int
    tp_size: int
    kv_dtype: str
    """`auto`, or what `kv_cache_config.dtype` or the checkpoint says (`fp8`, `nvfp4`)."""


def text_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model; all of it for most models."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    if nested.get("torch_dtype") or nested.get("dtype"):
        return nested
    return {**nested, "torch_dtype": config.get("torch_dtype") or config.get("dtype")}


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether the model takes more than text."""
    return any(f"{kind}_config" in config for kind in ("vision", "audio"))


def problems_of_model(config: Mapping[str, Any]) -> list[str]:
    """Why the KV cache of this model is not one pool of equal blocks; empty: it is."""
    text = text_model(config)
    found = [
        f"config.json has {name}: the model keeps a state besides the KV cache, which TensorRT-LLM "
        "does not hand to connectors; remove kv_connector_config"
        for name in STATE_FIELDS
        if text.get(name)
    ][:1]
    layer_types = text.get("layer_types") or ()
    if any("linear" in str(kind) or "mamba" in str(kind) for kind in layer_types):
        found.append("layers with linear attention keep a state; remove kv_connector_config")
    if text.get("is_encoder_decoder") or config.get("is_encoder_decoder"):
        found.append("an encoder-decoder model has a second KV cache; remove kv_connector_config")
    if text.get("index_head_dim") or text.get("index_topk"):
        found.append(
            "the model's sparse attention keeps a second cache of indices, which TensorRT-LLM does "
            "not hand to connectors; remove kv_connector_config"
        )
    if _differs_by_layer(text):
        found.append(
            "layers of different KV shape lie in several pools, and a connector is given one; "
            "remove kv_connector_config"
        )
    return found


def predict_layout(
    config: Mapping[str, Any], terms: KvTerms, given: KvLayoutConfig | None = None
) -> BlockLayout:
    """A block of one rank's pool, from config.json, the engine's choices and our corrections.

    Raises `ConfigError` when something is missing, with the setting that supplies it.
    """
    text, known = text_model(config), given or KvLayoutConfig()
    is_mla = bool(text.get("kv_lora_rank") and text.get("qk_rope_head_dim"))
    kv_factor = known.kv_factor or (1 if is_mla else 2)
    num_heads = known.num_kv_heads or (1 if is_mla else _num_kv_heads(text))
    return BlockLayout(
        num_layers=known.num_layers or _number(text, "num_hidden_layers", "num_layers"),
        kv_factor=kv_factor,
        # With more ranks than heads TensorRT-LLM gives every rank a copy of one.
        num_kv_heads=-(-num_heads // terms.tp_size),
        tokens_per_block=terms.tokens_per_block,
        head_dim=known.head_dim or _head_dim(text, is_mla=is_mla),
        dtype=known.dtype or _dtype(text, terms.kv_dtype),
    )


def _num_kv_heads(text: Mapping[str, Any]) -> int:
    name = "num_key_value_heads" if text.get("num_key_value_heads") else "num_attention_heads"
    return _number(text, name, "num_kv_heads")


def _head_dim(text: Mapping[str, Any], *, is_mla: bool) -> int:
    if is_mla:
        rank = _number(text, "kv_lora_rank", "head_dim")
        return rank + _number(text, "qk_rope_head_dim", "head_dim")
    if isinstance(text.get("head_dim"), int):
        return int(text["head_dim"])
    hidden = _number(text, "hidden_size", "head_dim")
    return hidden // _number(text, "num_attention_heads", "head_dim")


def _dtype(text: Mapping[str, Any], kv_dtype: str) -> str:
    """The element type: the engine's choice, or else the model's; bfloat16 where it names none."""
    if kv_dtype in _FP8_NAMES:
        return FP8
    if kv_dtype == "nvfp4":
        raise ConfigError(
            "the KV cache is NVFP4: its scales lie in a second pool, which TensorRT-LLM does not "
            "hand to connectors; set kv_cache_config.dtype to fp8, or take a checkpoint without "
            "an NVFP4 cache"
        )
    name = kv_dtype if kv_dtype != "auto" else text.get("torch_dtype") or text.get("dtype")
    name = str(name or "bfloat16").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(
            f"the KV cache's element type {name!r} is not one of {', '.join(DTYPE_BYTES)}; set "
            "kv_layout.dtype in the connector's YAML"
        )
    return name


def _number(text: Mapping[str, Any], name: str, setting: str) -> int:
    value = text.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigError(
        f"config.json of the model has no usable {name} ({value!r}); set kv_layout.{setting} in "
        "the connector's YAML"
    )


def _differs_by_layer(text: Mapping[str, Any]) -> bool:
    per_layer = text.get("num_key_value_heads")
    if isinstance(per_layer, Sequence) and len(set(per_layer)) > 1:
        return True
    global_dim = text.get("global_head_dim")
    if global_dim is not None and global_dim != text.get("head_dim"):
        return True
    return bool(text.get("block_configs") or text.get("num_kv_shared_layers"))
