"""From an engine's settings and its model to its namespaces: what decides bytes is in the name."""

from dataclasses import replace
from typing import Any

import pytest

from shared_cache.connector.trtllm_config import ConnectorConfig, KvLayoutConfig
from shared_cache.connector.trtllm_facts import (
    EngineFacts,
    check_engine,
    facts_of,
    quantization_of,
)
from shared_cache.errors import ConfigError
from tests.shared_cache.trtllm_doubles import (
    DEEPSEEK,
    LLAMA,
    LoadFormat,
    NewArgs,
    OldArgs,
    QuantConfig,
    files,
    make_args,
    runtime,
)

CONFIG = ConnectorConfig()
KINDS = [OldArgs, NewArgs]


def facts(kind: type[OldArgs] = OldArgs, config: Any = None, **settings: Any) -> EngineFacts:
    """The facts of a Llama with these engine settings."""
    return facts_of(make_args(kind, **settings), config or files(), "abc", CONFIG, runtime())


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_both_versions_are_accepted(kind: type[OldArgs]) -> None:
    args = make_args(kind)
    check_engine(args, CONFIG, runtime())
    found = facts_of(args, files(), "abc", CONFIG, runtime("1.3.0rc14"))
    name = found.namespace
    assert (name.model, name.revision, name.engine) == (
        "LlamaForCausalLM",
        "abc",
        "tensorrt_llm-1.3.0rc14",
    )
    assert name.quantization == "none+kv-auto"
    assert name.layout.shape == (3, 2, 2, 32, 16)
    assert (name.layout.dtype, found.tp_rank, found.tp_size) == ("bfloat16", 0, 1)
    assert found.max_num_tokens == 8192
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hybrid_override_pattern": "M*M*"}, "hybrid_override_pattern"),
        ({"full_attention_interval": 4}, "full_attention_interval"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"index_head_dim": 128, "index_topk": 2048}, "sparse attention"),
        ({"num_key_value_heads": [2, 4, 2]}, "different KV shape"),
        ({"block_configs": [{}]}, "different KV shape"),
        ({"global_head_dim": 512}, "different KV shape"),
    ],
)
def test_models_whose_cache_is_more_than_one_pool_are_refused(
    changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        facts(config=files(**changed))
    nested = files({"architectures": ["X"], "text_config": {**LLAMA, **changed}})
    with pytest.raises(ConfigError, match=named):
        facts(config=nested)


@pytest.mark.parametrize(
    ("tp_size", "kv_heads", "local"),
    [(1, 8, 8), (2, 8, 4), (8, 8, 1), (4, 2, 1), (8, 2, 1), (4, 6, 2)],
)
def test_kv_heads_are_split_among_ranks_and_copied_where_they_are_too_few(
    tp_size: int, kv_heads: int, local: int
) -> None:
    found = facts(config=files(num_key_value_heads=kv_heads), tensor_parallel_size=tp_size, rank=0)
    assert found.layout.num_kv_heads == local


def test_a_model_without_grouped_heads_has_as_many_kv_heads_as_heads() -> None:
    config = {
        name: value for name, value in LLAMA.items() if name[:7] not in ("num_key", "head_di")
    }
    assert facts(config=files(config)).layout.shape == (3, 2, 8, 32, 8)


@pytest.mark.parametrize("tp_size", [1, 4])
def test_mla_keeps_one_vector_a_token_whole_on_every_rank(tp_size: int) -> None:
    found = facts(config=files(DEEPSEEK), tensor_parallel_size=tp_size, rank=0)
    assert found.layout.shape == (4, 1, 1, 32, 576)


def test_the_text_part_of_a_model_with_images_counts() -> None:
    config = {"architectures": ["V"], "vision_config": {}, "text_config": LLAMA, "dtype": "float16"}
    found = facts(config=files(config))
    assert found.layout.shape == (3, 2, 2, 32, 16)
    assert found.layout.dtype == "bfloat16", "the nested one counts"
    assert "images" in found.warnings[0]
    nested = {**LLAMA, "torch_dtype": None}
    assert facts(config=files(config, text_config=nested)).layout.dtype == "float16"
    nested["dtype"] = "float32"
    both = files(config, text_config=nested, torch_dtype="float16")
    assert facts(config=both).layout.dtype == "float32"


@pytest.mark.parametrize(
    ("settings", "config", "quantization", "dtype"),
    [
        ({}, {}, "none+kv-auto", "bfloat16"),
        ({}, {"torch_dtype": None, "dtype": "float16"}, "none+kv-auto", "float16"),
        ({}, {"torch_dtype": None}, "none+kv-auto", "bfloat16"),
        ({"dtype": "fp8"}, {}, "none+kv-fp8", "float8_e4m3fn"),
        (
            {"quant": QuantConfig(quant_algo="FP8", kv_cache_quant_algo="FP8")},
            {},
            "FP8+kv-fp8",
            "float8_e4m3fn",
        ),
        ({"quant": QuantConfig(kv_cache_quant_algo="NO_QUANT")}, {}, "none+kv-auto", "bfloat16"),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, "fp8+kv-auto", "bfloat16"),
        (
            {},
            {
                "quantization_config": {
                    "quant_method": "modelopt",
                    "quant_algo": "NVFP4",
                    "kv_cache_scheme": {"num_bits": 8, "type": "float"},
                }
            },
            "NVFP4+kv-fp8",
            "float8_e4m3fn",
        ),
    ],
)
def test_quantisation_and_kv_dtype(
    settings: dict[str, Any], config: dict[str, Any], quantization: str, dtype: str
) -> None:
    found = facts(config=files(**config), **settings)
    assert found.namespace.quantization == quantization
    assert found.layout.dtype == dtype


def test_the_checkpoint_s_files_say_how_it_is_quantised_in_every_process() -> None:
    listed = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    model = replace(files(), hf_quant_config=listed)
    in_parent = make_args(OldArgs, quant=QuantConfig(quant_algo="FP8", kv_cache_quant_algo="FP8"))
    in_child = make_args(OldArgs)
    assert quantization_of(in_parent, model) == quantization_of(in_child, model) == ("FP8", "fp8")
    mixed = replace(
        files(),
        hf_quant_config={"quantization": {"quant_algo": "MIXED_PRECISION"}},
        quant_cfg={"kv_cache_quant_algo": "FP8"},
    )
    assert quantization_of(in_child, mixed) == ("MIXED_PRECISION", "fp8")


@pytest.mark.parametrize(
    "settings", [{"dtype": "nvfp4"}, {"quant": QuantConfig(kv_cache_quant_algo="NVFP4")}]
)
def test_a_cache_whose_scales_cannot_be_saved_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"NVFP4.*set kv_cache_config\.dtype to fp8"):
        facts(**settings)


@pytest.mark.parametrize(
    ("gone", "setting"),
    [
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_kv_heads"),
        ("hidden_size", "head_dim"),
    ],
)
def test_what_config_json_lacks_is_asked_for(gone: str, setting: str) -> None:
    config = {**LLAMA, gone: None, "num_key_value_heads": None, "head_dim": None}
    with pytest.raises(ConfigError, match=rf"set kv_layout\.{setting}"):
        facts(config=files(config))


def test_a_dtype_that_is_none_of_ours_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"set kv_layout\.dtype"):
        facts(config=files(torch_dtype="float64"))


def test_a_layout_given_whole_needs_no_config_json() -> None:
    layout = KvLayoutConfig(num_layers=5, kv_factor=2, num_kv_heads=4, head_dim=8, dtype="float16")
    config = ConnectorConfig(kv_layout=layout, model="mine")
    args = make_args(OldArgs, tensor_parallel_size=2, rank=1)
    found = facts_of(args, files({"model_type": "x"}), "r", config, runtime())
    assert found.layout.shape == (5, 2, 2, 32, 8)
    assert found.namespace.model == "mine"


def test_shards_differ_in_their_rank_alone() -> None:
    found = facts(tensor_parallel_size=2, rank=1)
    assert (found.tp_rank, found.tp_size) == (1, 2)
    first, second = found.namespace_of(0), found.namespace_of(1)
    assert first.fingerprint != second.fingerprint
    assert replace(second, tp_rank=0) == first == found.namespace
    other = facts(tensor_parallel_size=2, rank=0)
    assert other.namespace == found.namespace, "all ranks agree on the names"


def test_the_rank_comes_from_mpi_where_the_mapping_has_none() -> None:
    args = make_args(OldArgs, tensor_parallel_size=2)
    found = facts_of(args, files(), "r", CONFIG, runtime(rank=1))
    assert found.tp_rank == 1
    with pytest.raises(ConfigError, match="rank 2, and tensor_parallel_size is 2"):
        facts_of(args, files(), "r", CONFIG, runtime(rank=2))
    alone = facts_of(make_args(OldArgs), files(), "r", CONFIG, runtime(rank=3))
    assert alone.tp_rank == 0, "one of several engines that were started under one MPI"


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens_per_block": 64},
        {"dtype": "fp8"},
        {"quant": QuantConfig(quant_algo="FP8")},
        {"tensor_parallel_size": 2, "rank": 0},
        {"load_format": LoadFormat.DUMMY},
        {"model_kwargs": {"num_hidden_layers": 2}},
    ],
)
def test_whatever_decides_the_bytes_makes_another_namespace(changed: dict[str, Any]) -> None:
    base = facts(NewArgs).namespace.fingerprint
    assert facts(NewArgs, **changed).namespace.fingerprint != base
    assert facts(NewArgs, max_num_tokens=64).namespace.fingerprint == base


def test_versions_of_one_release_share_and_releases_do_not() -> None:
    args = make_args(OldArgs)
    prints = [
        facts_of(args, files(), "r", CONFIG, runtime(version)).namespace.fingerprint
        for version in ("1.2.0", "1.2.1", "1.3.0", "dev")
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_version_with_a_suffix_shares_with_itself_alone() -> None:
    args = make_args(OldArgs)
    versions = ("1.3.0", "1.3.0rc0", "1.3.0rc29", "1.3.0a1", "1.3.0b1", "1.3.0.dev5", "1.3.0+cu13")
    engines = [
        facts_of(args, files(), "r", CONFIG, runtime(version)).namespace.engine
        for version in versions
    ]
    assert engines == ["tensorrt_llm-1.3", *(f"tensorrt_llm-{one}" for one in versions[1:])]
