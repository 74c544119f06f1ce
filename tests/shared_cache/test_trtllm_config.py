"""The connector's YAML file: small, strict, and found by every rank."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.trtllm_config import (
    CONFIG_VARIABLE,
    ConnectorConfig,
    read_connector_config,
)
from shared_cache.connector.trtllm_facts import check_engine
from shared_cache.connector.trtllm_refusals import warnings_of
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.errors import ConfigError
from tests.shared_cache.trtllm_doubles import NewArgs, OldArgs, make_args, runtime

CONFIGS = Path(__file__).parents[2] / "configs"


def read(tmp_path: Path, text: str) -> ConnectorConfig:
    file = tmp_path / "cache.yaml"
    file.write_text(text, encoding="utf-8")
    path, config = read_connector_config({CONFIG_VARIABLE: str(file)})
    assert path == file
    return config


def test_one_line_is_enough(tmp_path: Path) -> None:
    config = read(tmp_path, "store: file:///data/kv")
    assert [tier.url for tier in config.all_tiers] == ["file:///data/kv"]
    assert (config.match_wait_s, config.staged_ahead) == (0.05, False)
    assert "bytes" not in config.host.model_fields_set, "sized for the machine when it is opened"


def test_addresses_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_PLACE", "/fast")
    config = read(tmp_path, "tiers: [{url: $KVC_PLACE/kv}, {url: 's3://bucket/kv'}]")
    assert [tier.url for tier in config.tiers] == ["file:///fast/kv", "s3://bucket/kv"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stor: file:///x", "did you mean `store`"),
        ("store: memory://x", "memory of each process alone"),
        ("tiers: [{url: 'memory://x'}]", "memory of each process alone"),
        ("store: $KVC_NOT_SET/x", "KVC_NOT_SET.*not set"),
        ("match_wait_s: -1", "match_wait_s.*greater than or equal to 0"),
        ("match_wait_s: 60", "match_wait_s.*less than or equal to 10"),
        ("kv_layout: {layers: 3}", "kv_layout.layers: no such setting"),
        ("store: /a\nstore: /b", "given twice"),
        ("", "must hold settings such as `store: file:///data/kvcommons`"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, text)


def test_a_variable_that_is_not_set_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"store: file:///path.*before `LLM"):
        read_connector_config({})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*gone\.yaml"):
        read_connector_config({CONFIG_VARIABLE: str(tmp_path / "gone.yaml")})


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"relative path.*give the whole one, such as /"):
        read_connector_config({CONFIG_VARIABLE: "cache.yaml"})


def test_the_shipped_file_loads() -> None:
    file = CONFIGS / "trtllm-serve-cache.yaml"
    _, config = read_connector_config({CONFIG_VARIABLE: str(file)})
    (tier,) = config.all_tiers
    assert tier.url.startswith("file:///")


@pytest.mark.parametrize("kind", [OldArgs, NewArgs])
def test_the_shipped_engine_options_name_our_classes_and_are_accepted(kind: type[OldArgs]) -> None:
    options = yaml.safe_load((CONFIGS / "trtllm-serve.yaml").read_text(encoding="utf-8"))
    named = options.pop("kv_connector_config")
    assert sorted(named) == [
        "connector_module",
        "connector_scheduler_class",
        "connector_worker_class",
    ], "1.2 refuses any other name"
    assert importlib.util.find_spec(named["connector_module"]) is not None
    assert named["connector_scheduler_class"] == SharedCacheScheduler.__name__
    assert named["connector_worker_class"] == SharedCacheWorker.__name__
    args = make_args(kind, **options.pop("kv_cache_config"))
    assert not options
    check_engine(args, ConnectorConfig(), runtime())
    assert warnings_of(args) == []
