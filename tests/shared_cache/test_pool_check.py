"""A pool that is not what the cache was opened for is refused, and the text says what to set."""

from dataclasses import replace

import pytest

from shared_cache.connector.pool_check import check_pool
from shared_cache.connector.trtllm_config import KvLayoutConfig
from shared_cache.errors import ConfigError
from shared_cache.namespace import DTYPE_BYTES, BlockLayout

LAYOUT = BlockLayout(3, 2, 4, 32, 16, "bfloat16")
MLA = BlockLayout(3, 1, 1, 32, 576, "bfloat16")
FP8 = replace(LAYOUT, dtype="float8_e4m3fn")
SHAPE = (10, 3, 2, 4 * 32 * 16)


@pytest.mark.parametrize("num_blocks", [1, 10])
def test_the_pool_of_the_layout_is_accepted(num_blocks: int) -> None:
    check_pool((num_blocks, *SHAPE[1:]), "bfloat16", LAYOUT, is_contiguous=True)
    check_pool((num_blocks, 3, 1, 32 * 576), "bfloat16", MLA, is_contiguous=True)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bits8", "uint8"])
def test_fp8_is_accepted_under_each_of_its_names(dtype: str) -> None:
    check_pool(SHAPE, dtype, FP8, is_contiguous=True)
    with pytest.raises(ConfigError, match="holds 64 tokens"):
        check_pool((10, 3, 2, 4 * 64 * 16), dtype, FP8, is_contiguous=True)


@pytest.mark.parametrize("dtype", ["bits8", "uint8", "int8", "int32", "float64"])
@pytest.mark.parametrize("layout", [LAYOUT, replace(LAYOUT, dtype="float16")])
def test_no_setting_is_offered_that_its_class_rejects(dtype: str, layout: BlockLayout) -> None:
    with pytest.raises(ConfigError) as caught:
        check_pool(SHAPE, dtype, layout, is_contiguous=True)
    assert f"its elements are {dtype}" in str(caught.value)
    assert "kv_cache_config.dtype" in str(caught.value)
    assert "kv_layout.dtype" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_setting_that_is_offered_is_taken(dtype: str) -> None:
    assert KvLayoutConfig(dtype=dtype).dtype == dtype


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "named"),
    [
        (SHAPE[:3], "bfloat16", LAYOUT, "use_kv_cache_manager_v2 to false"),
        ((*SHAPE, 1), "bfloat16", LAYOUT, "use_kv_cache_manager_v2 to false"),
        (SHAPE, "float16", LAYOUT, r"set kv_layout\.dtype: float16"),
        (SHAPE, "float8_e4m3fn", LAYOUT, r"kv_cache_config\.dtype"),
        ((10, 3, 2, 1024), "int8", LAYOUT, "NVFP4.*dtype to fp8"),
        ((10, 3, 2, 1024), "uint8", FP8, "NVFP4.*dtype to fp8"),
        ((10, 3, 2, 1024), "bits8", FP8, "NVFP4.*dtype to fp8"),
        (SHAPE, "bfloat16", FP8, r"set kv_layout\.dtype: bfloat16"),
        (SHAPE, "uint8", LAYOUT, r"if it is FP8, set kv_cache_config\.dtype to fp8"),
        ((10, 4, 2, 2048), "bfloat16", LAYOUT, r"4 layers.*json 3.*kv_layout\.num_layers"),
        ((10, 3, 1, 2048), "bfloat16", LAYOUT, r"kv_layout\.kv_factor"),
        ((10, 3, 2, 2040), "bfloat16", LAYOUT, r"no whole number.*kv_layout\.num_kv_heads"),
        ((10, 3, 1, 64 * 576), "bfloat16", MLA, "holds 64 tokens.*FlashMLA.*takes 64"),
        ((10, 3, 2, 8192 * 64), "bfloat16", LAYOUT, "holds 8192 tokens.*attn_backend to TRTLLM"),
    ],
)
def test_another_pool_is_refused_with_the_fix(
    shape: tuple[int, ...], dtype: str, layout: BlockLayout, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_pool(shape, dtype, layout, is_contiguous=True)


def test_a_pool_in_pieces_is_refused() -> None:
    with pytest.raises(ConfigError, match="not contiguous"):
        check_pool(SHAPE, "bfloat16", LAYOUT, is_contiguous=False)


def test_equal_bytes_are_not_enough() -> None:
    """Half the heads and twice the tokens: as long, and every token in another place."""
    other = replace(LAYOUT, num_kv_heads=8, tokens_per_block=16)
    assert other.block_bytes == LAYOUT.block_bytes
    with pytest.raises(ConfigError, match="holds 16 tokens"):
        check_pool(
            (10, 3, 2, 8 * 16 * 16), "bfloat16", replace(LAYOUT, num_kv_heads=8), is_contiguous=True
        )
