"""What an engine must not do beside the connector: refused at start, each with the way out."""

from typing import Any

import pytest

from shared_cache.connector.trtllm_config import ConnectorConfig
from shared_cache.connector.trtllm_facts import check_engine
from shared_cache.connector.trtllm_refusals import warnings_of
from shared_cache.errors import ConfigError
from tests.shared_cache.trtllm_doubles import (
    LoadFormat,
    NewArgs,
    OldArgs,
    Policy,
    SchedulerConfig,
    make_args,
    runtime,
)

CONFIG = ConnectorConfig()
KINDS = [OldArgs, NewArgs]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"backend": "_autodeploy"}, "PyTorch backend"),
    ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2.*use tensor_parallel_size"),
    ({"context_parallel_size": 2}, "context_parallel_size is 2"),
    ({"tensor_parallel_size": 16, "gpus_per_node": 8}, "lower it to at most 8"),
    ({"tensor_parallel_size": 2, "orchestrator_type": "ray"}, "leave orchestrator_type unset"),
    ({"enable_attention_dp": True}, "enable_attention_dp is on.*set it to false"),
    ({"max_beam_width": 2}, "max_beam_width is 2.*set it to 1"),
    ({"speculative_config": object()}, "remove speculative_config"),
    ({"enable_block_reuse": False}, "enable_block_reuse is off.*set it to true"),
    ({"enable_partial_reuse": True}, "enable_partial_reuse is on.*set it to false"),
    ({"host_cache_size": 1 << 30}, "host_cache_size is set.*host.bytes"),
    ({"max_attention_window": [512, 1024]}, "several sizes .*512, 1024.*remove it"),
    ({"max_attention_window": [512]}, "set max_seq_len to at most 512"),
    ({"max_attention_window": [512], "max_seq_len": 513}, "set max_seq_len to at most 512"),
    ({"sink_token_length": 4}, "sink_token_length is set"),
    ({"attn_backend": "VANILLA"}, "attn_backend VANILLA.*use TRTLLM"),
    ({"attn_backend": "FLASHINFER"}, "attn_backend FLASHINFER"),
    (
        {"scheduler_config": SchedulerConfig(capacity_scheduler_policy=Policy.MAX_UTILIZATION)},
        "MAX_UTILIZATION.*use GUARANTEED_NO_EVICT",
    ),
    ({"mm_encoder_only": True}, "no KV cache"),
    ({"enable_lora": True}, "trust_lora_ids: true"),
    ({"lora_config": object()}, "trust_lora_ids: true"),
]

REFUSED_NEW: list[tuple[dict[str, Any], str]] = [
    ({"use_kv_cache_manager_v2": True}, "manager_v2 is True.*set it to false"),
    ({"use_kv_cache_manager_v2": "auto"}, "manager_v2 is 'auto'.*set it to false"),
    ({"use_kv_cache_manager_v2": "auto"}, "Newer versions of TensorRT-LLM say 'auto'"),
    ({"disk_cache_size": 1}, "disk_cache_size is set"),
    ({"sparse_attention_config": object()}, "sparse_attention_config is set"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [(kind, *case) for kind in KINDS for case in REFUSED]
    + [(NewArgs, *case) for case in REFUSED_NEW],
)
def test_what_excludes_the_connector_is_refused_with_the_fix(
    kind: type[OldArgs], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_engine(make_args(kind, **settings), CONFIG, runtime())


def test_all_problems_are_told_at_once() -> None:
    args = make_args(OldArgs, host_cache_size=1, max_beam_width=4, enable_attention_dp=True)
    with pytest.raises(ConfigError) as caught:
        check_engine(args, CONFIG, runtime())
    assert str(caught.value).count("\n  - ") == 3


def test_what_is_in_order_is_not_refused() -> None:
    settings = {"max_attention_window": [512], "max_seq_len": 512, "host_cache_size": 0}
    check_engine(make_args(OldArgs, **settings), CONFIG, runtime())
    ray = make_args(OldArgs, orchestrator_type="ray")
    check_engine(ray, CONFIG, runtime())
    check_engine(
        make_args(NewArgs, enable_lora=True), ConnectorConfig(trust_lora_ids=True), runtime()
    )


def test_an_environment_that_switches_reuse_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="unset it"):
        check_engine(make_args(OldArgs), CONFIG, runtime(FORCE_DETERMINISTIC="1"))
    check_engine(make_args(OldArgs), CONFIG, runtime(FORCE_DETERMINISTIC="0"))


def test_settings_without_a_kv_section_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokens_per_block is not set"):
        check_engine(object(), CONFIG, runtime())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_format": LoadFormat.VISION_ONLY}, "load_format is VISION_ONLY.*set revision"),
        ({"load_format": "gms"}, "load_format is gms.*set revision"),
        ({"ray_worker_extension_cls": "a.B"}, r"extension_cls is a\.B.*set revision"),
    ],
)
def test_weights_that_are_not_the_files_need_a_name(settings: dict[str, Any], named: str) -> None:
    args = make_args(NewArgs, **settings)
    with pytest.raises(ConfigError, match=named):
        check_engine(args, CONFIG, runtime())
    check_engine(args, ConnectorConfig(revision="ours-7"), runtime())


@pytest.mark.parametrize("load_format", [LoadFormat.AUTO, LoadFormat.DUMMY, "auto", "dummy"])
def test_weights_of_the_files_and_random_ones_need_none(load_format: Any) -> None:
    check_engine(make_args(NewArgs, load_format=load_format), CONFIG, runtime())


def test_memory_of_one_process_serves_one_rank_only() -> None:
    config = ConnectorConfig(host={"scope": "process"})
    check_engine(make_args(OldArgs), config, runtime())
    with pytest.raises(ConfigError, match="write scope: node"):
        check_engine(make_args(OldArgs, tensor_parallel_size=2), config, runtime())


def test_settings_that_cost_hits_are_warned_of() -> None:
    assert warnings_of(make_args(OldArgs)) == []
    in_place = make_args(OldArgs, enable_partial_reuse=True, copy_on_partial_reuse=False)
    (partial,) = warnings_of(in_place)
    assert "set it to false" in partial
    check_engine(in_place, CONFIG, runtime())
    (disaggregated,) = warnings_of(make_args(OldArgs, cache_transceiver_config={"backend": "UCX"}))
    assert "decode engines no connector" in disaggregated
