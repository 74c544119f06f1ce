"""What an engine refuses to start with, each with its fix in the text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.config import EngineConfig, KvCacheConfig, ModelSource, ReplicaConfig
from actors.engines import build_engine
from actors.engines.torch.model import FAMILIES, check_config, load_model
from shared_cache.config import CacheConfig
from shared_cache.errors import ConfigError, ModelError
from tests.engine.conftest import ModelPath
from tests.tiny_model import tiny_config, tiny_source


def replica(path: Path, cache: CacheConfig | None = None, **engine: Any) -> ReplicaConfig:
    return ReplicaConfig(
        name="replica", model=tiny_source(path), engine=EngineConfig(**engine), cache=cache
    )


def test_an_engine_is_built_from_its_settings(model_path: ModelPath) -> None:
    kv = KvCacheConfig(tokens_per_block=16, max_tokens=100)
    engine = build_engine(replica(model_path(), kv_cache_config=kv, torch_threads=1))
    try:
        assert engine.max_total_tokens == 96
        layout = engine.namespace.layout
        assert layout.shape == (2, 2, 2, 16, 16)
        assert (engine.namespace.model, engine.namespace.engine) == ("tiny", "torch")
        assert engine.cache is None
        assert engine.is_alive()
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_cache_config": KvCacheConfig(max_tokens=31)}, "max_tokens .31. is below"),
        ({"kv_cache_config": KvCacheConfig(max_tokens=1 << 45)}, "max_tokens"),
        ({"device": "cuda:99"}, "device"),
        ({"device": "nonsense"}, "device"),
        (
            {"kv_cache_config": KvCacheConfig(enable_block_reuse=False, host_cache_size=1 << 20)},
            "enable_block_reuse",
        ),
    ],
)
def test_settings_that_cannot_work(
    settings: dict[str, Any], named: str, model_path: ModelPath
) -> None:
    with pytest.raises(ConfigError, match=named):
        build_engine(replica(model_path(), **settings))


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(ModelSource(name="gone", path=str(tmp_path / "gone"), revision="1"))


@pytest.mark.parametrize(
    ("missing", "named"),
    [("model.safetensors", "cannot be loaded"), ("tokenizer*", "tokenizer")],
)
def test_a_model_that_lacks_a_part(
    missing: str, named: str, model_path: ModelPath, tmp_path: Path
) -> None:
    source = tiny_source(model_path())
    shutil.copytree(source.path, tmp_path / "m", ignore=shutil.ignore_patterns(missing))
    with pytest.raises(ModelError, match=named):
        load_model(source.model_copy(update={"path": str(tmp_path / "m")}))


def test_a_config_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(ModelSource(name="odd", path=str(tmp_path), revision="1"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_the_list_is_accepted(family: str) -> None:
    check_config(tiny_config(family), 1024)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (tiny_config("gemma2"), "does not run 'gemma2'"),
        (tiny_config("mistral", sliding_window=512), "max_seq_len to at most 512"),
        (
            tiny_config("qwen2", use_sliding_window=True, sliding_window=256, max_window_layers=1),
            "max_seq_len to at most 256",
        ),
        (
            tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            "dynamic",
        ),
    ],
)
def test_models_that_would_run_and_be_wrong(config: Any, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        check_config(config, 1024)


def test_a_sliding_window_that_is_never_reached_is_accepted() -> None:
    check_config(tiny_config("mistral", sliding_window=512), 512)
    check_config(tiny_config("qwen3", sliding_window=256, use_sliding_window=False), 1024)


def test_a_transformers_that_is_too_old_is_named(
    model_path: ModelPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.engines.version", lambda package: "4.57.1")
    with pytest.raises(ConfigError, match=r"here is 4\.57\.1: pip install 'kvcommons\[embedded\]'"):
        build_engine(replica(model_path()))
