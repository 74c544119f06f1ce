"""The engine's pool against the layout that was predicted for it, before a byte is copied.

Blocks are named by their tokens. With 64 tokens in a slot where the names say 32, every load would
put half of a prefix in its place and garbage behind it, without an error. TensorRT-LLM replaces the
size of blocks by itself in two cases, so it is compared, with all else. Pure.
"""

from collections.abc import Sequence

from shared_cache.errors import ConfigError
from shared_cache.namespace import DTYPE_BYTES, BlockLayout

OPAQUE_BYTES = ("bits8", "uint8")
"""How versions of TensorRT-LLM call the elements of an FP8 pool that do not say `float8_e4m3fn`."""

POOL_AXES = "[num_blocks, num_layers, kv_factor, heads * tokens_per_block * head_dim]"


def check_pool(
    shape: Sequence[int], dtype: str, layout: BlockLayout, *, is_contiguous: bool
) -> None:
    """Raises `ConfigError`, with the fix, unless the pool holds blocks of `layout`.

    `shape` and `dtype` (`bfloat16`) are those of the tensor that TensorRT-LLM registers.
    """
    problem = (
        _axes(shape, is_contiguous=is_contiguous)
        or _element_type(shape, dtype, layout)
        or _model(shape, layout)
        or _block_size(shape, layout)
    )
    if problem:
        raise ConfigError(f"the engine's KV pool is not what the cache was opened for: {problem}")


def _axes(shape: Sequence[int], *, is_contiguous: bool) -> str | None:
    if len(shape) == 4 and is_contiguous:
        return None
    kind = "contiguous" if is_contiguous else "not contiguous"
    return (
        f"its shape is {tuple(shape)}, {kind}, not {POOL_AXES} in one piece; set "
        "kv_cache_config.use_kv_cache_manager_v2 to false where that setting exists"
    )


def _element_type(shape: Sequence[int], dtype: str, layout: BlockLayout) -> str | None:
    if dtype == layout.dtype:
        return None
    elements = layout.num_kv_heads * layout.tokens_per_block * layout.head_dim
    if dtype in ("int8", *OPAQUE_BYTES) and shape[3] * 2 == elements:
        return (
            "it is NVFP4, whose scales TensorRT-LLM does not hand to connectors; set "
            "kv_cache_config.dtype to fp8, or take another checkpoint"
        )
    if dtype in OPAQUE_BYTES and layout.dtype == "float8_e4m3fn":
        return None
    told = f"its elements are {dtype}, not {layout.dtype}"
    if dtype in DTYPE_BYTES:
        return (
            f"{told}; if that is what you want, set kv_layout.dtype: {dtype} in the connector's "
            "YAML, or else kv_cache_config.dtype"
        )
    if dtype in OPAQUE_BYTES:
        return f"{told}; if it is FP8, set kv_cache_config.dtype to fp8, so that all are told"
    return f"{told}, and the cache knows {', '.join(DTYPE_BYTES)}; set kv_cache_config.dtype"


def _model(shape: Sequence[int], layout: BlockLayout) -> str | None:
    if shape[1] != layout.num_layers:
        return (
            f"it has {shape[1]} layers, the model's config.json {layout.num_layers}; unset "
            "TLLM_OVERRIDE_LAYER_NUM, or correct kv_layout.num_layers in the connector's YAML"
        )
    if shape[2] != layout.kv_factor:
        return (
            f"it keeps {shape[2]} vectors for a token and head (kv_factor), not "
            f"{layout.kv_factor}; correct kv_layout.kv_factor in the connector's YAML"
        )
    return None


def _block_size(shape: Sequence[int], layout: BlockLayout) -> str | None:
    token_elements = layout.num_kv_heads * layout.head_dim
    tokens, rest = divmod(shape[3], token_elements)
    if rest:
        return (
            f"{shape[3]} elements of a layer are no whole number of tokens of "
            f"{layout.num_kv_heads} heads with {layout.head_dim} elements each; correct "
            "kv_layout.num_kv_heads and kv_layout.head_dim in the connector's YAML"
        )
    if tokens == layout.tokens_per_block:
        return None
    return (
        f"a block holds {tokens} tokens, and kv_cache_config.tokens_per_block says "
        f"{layout.tokens_per_block}. FlashMLA (MLA models on Hopper) always takes 64: set "
        "tokens_per_block to that. The attention backend VANILLA takes max_num_tokens: set "
        "attn_backend to TRTLLM. If it is neither, correct kv_layout.num_kv_heads and head_dim in "
        "the connector's YAML"
    )
