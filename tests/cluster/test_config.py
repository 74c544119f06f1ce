"""Configurations: the shipped ones load, and mistakes are named with their place and their fix."""

from pathlib import Path

import pytest
import yaml

from cluster.config import ClusterConfig, load_config
from shared_cache.errors import ConfigError
from shared_cache.settings_file import expand_store_url

CONFIGS = Path(__file__).parents[2] / "configs"


SHIPPED = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if not path.name.startswith(("trtllm", "serve", "llama"))
]
"""Those that need no GPU; the others have tests of their own."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_loads(path):
    config = load_config(path)
    assert config.model == "smollm2-135m"
    assert len(config.replica_names) == config.min_replicas <= config.max_replicas


def test_the_configuration_for_gpus_reserves_one_for_each_replica():
    config = load_config(CONFIGS / "llama8b-gpu.yaml")
    assert config.engine.is_cuda
    assert config.engine.torch_dtype == "bfloat16"
    assert config.gpus_per_replica == 1
    assert config.cache.host.populate
    on_a_gpu = {"model": "x", "engine": {"device": "cuda:0"}}
    assert ClusterConfig.model_validate(on_a_gpu).gpus_per_replica == 1


def test_what_serve_deploys_is_the_application_of_a_shipped_configuration():
    schema = pytest.importorskip("ray.serve.schema")
    text = (CONFIGS / "serve.yaml").read_text(encoding="utf-8")
    (application,) = schema.ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "cluster.app:build"
    assert load_config(CONFIGS.parent / application.args["config"]).model == "smollm2-135m"


def test_the_default_shares_through_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = load_config(CONFIGS / "cpu.yaml").cache
    (tier,) = cache.all_tiers
    assert tier.url == f"file://{tmp_path}/.cache/kvcommons/store"
    assert cache.host.bytes == 512 << 20


def test_replicas_share_the_cluster_s_arena_and_start_no_owner_themselves():
    config = ClusterConfig(name="mine", model="x", cache={"store": "file:///x"})
    assert config.cache.host.start_owner
    assert config.replica_cache.host.model_dump(include={"name", "start_owner"}) == {
        "name": "mine",
        "start_owner": False,
    }
    named = ClusterConfig(model="x", cache={"host": {"name": "ours"}})
    assert named.replica_cache.host.name == "ours"
    assert ClusterConfig(model="x").replica_cache is None


def load(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: x\nreplcas: 2", ["replcas", "did you mean `replicas`", "allowed here: name, mod"]),
        ("model: x\nzzz: 2", ["zzz: no such setting; allowed here: name"]),
        (
            "model: x\nengine: {kv_cache_config: {tokens_per_blok: 3}}",
            ["engine.kv_cache_config.tokens_per_blok", "did you mean `tokens_per_block`"],
        ),
        ("model: x\ncache: {hosts: 3}", ["cache.hosts", "`host`", "io_threads"]),
        ("model: x\ncache: {host: {byts: 3}}", ["cache.host.byts", "`bytes`", "eviction"]),
        ("model: x\ncache: {tiers: [{ulr: s}]}", ["cache.tiers.0.ulr", "`url`", "max_bytes"]),
        ("model: x\ncache: {store: /a, tiers: [{url: /b}]}", ["`store` or `tiers`, not both"]),
        ("model: x\ncache: {tiers: [{url: 'memory://x'}]}", ["cache: memory://x", "file://"]),
        (
            "model: x\nengine: {speculative_config: {max_draf_len: 3}}",
            ["engine.speculative_config.max_draf_len", "`max_draft_len`"],
        ),
        ("model: x\nreplicas: two", ["replicas: ", "integer", "given: 'two'"]),
        ("model: x\nreplicas: 0", ["replicas: ", "of at least 1, or a range", "given: 0"]),
        ("model: x\nrouter: {policy: best}", ["router.policy", "'least_cost'", "'round_robin'"]),
        ("replicas: 2", ["model: Field required"]),
        ("model: x\ncache: {host: {bytes: lots}}", ["cache.host.bytes", "lots"]),
        (
            "model: x\ncache: {store: 'file://${KVC_NOT_SET}/x'}",
            ["cache", "KVC_NOT_SET", "not set"],
        ),
        ("model: x\ncache: {store: ''}", ["cache: ''", "names no place", "null"]),
        ("model: x\ncache: {store: 'memory://x'}", ["cache: memory://x", "file://", "null"]),
        ("model: x\ncache: {store: 'simplecache::memory://x'}", ["share nothing"]),
        (
            "model: x\nengine: {max_batch_size: 600}",
            ["engine: max_num_tokens (512) is below max_batch_size (600)", "raise it"],
        ),
        ("model: x\nname: My Cluster", ["name: "]),
        ("model: x\nmodel: y", ["'model' is given twice", "line 2"]),
        ("model: [x", ["not valid YAML", "line"]),
        ("just text", ["must hold settings"]),
        (
            "model: x\ncache: {}\nengine: {kv_cache_config: {host_cache_size: 1MiB}}",
            ["host_cache_size", "remove host_cache_size"],
        ),
    ],
)
def test_mistakes_are_named(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert "mine.yaml" in message
    for part in expected:
        assert part in message


def test_all_mistakes_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "modle: x\nserve: {prot: 1}\nreplicas: -1")
    assert all(part in str(caught.value) for part in ("modle", "serve.prot", "replicas", "model:"))


def test_a_missing_file_names_its_neighbours(tmp_path):
    with pytest.raises(ConfigError, match=r"beside it are cpu\.yaml"):
        load_config(CONFIGS / "cpuu.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/x", "s3://bucket/x"),
        ("memory://x", "memory://x"),
        ("file:///a/b", "file:///a/b"),
        ("/a/../b", "file:///b"),
        ("~/store", "file:///home/me/store"),
        ("file://~/store", "file:///home/me/store"),
        ("file://$KVC_TEST/store", "file:///data/store"),
        ("s3://${KVC_BUCKET}/x", "s3://mine/x"),
    ],
)
def test_store_urls_are_expanded(monkeypatch, url, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("KVC_TEST", "/data")
    monkeypatch.setenv("KVC_BUCKET", "mine")
    assert expand_store_url(url) == expected


def test_a_relative_store_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = ClusterConfig(model="x", cache={"store": "file://here"})
    assert config.cache.store == f"file://{tmp_path}/here"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "names no place"),
        ("  ", "names no place"),
        ("file://", "names no place"),
        ("s3://", "names no place"),
        ("$KVC_EMPTY", "KVC_EMPTY .* is empty; set it"),
        ("file://${KVC_EMPTY}", "KVC_EMPTY .* is empty; set it"),
        ("file://$KVC_EMPTY/store", "KVC_EMPTY .* is empty; set it"),
        ("file://$KVC_NOT_SET", "KVC_NOT_SET .* is not set; set it"),
        ("file://${KVC_NOT_SET-x}", "not set"),
    ],
)
def test_a_store_that_names_no_place_is_not_the_working_directory(monkeypatch, url, text):
    monkeypatch.setenv("KVC_EMPTY", "")
    monkeypatch.delenv("KVC_NOT_SET", raising=False)
    with pytest.raises(ValueError, match=text):
        expand_store_url(url)


def test_a_variable_may_hold_a_dollar_sign(monkeypatch):
    monkeypatch.setenv("KVC_TEST", "/a$b")
    assert expand_store_url("file://$KVC_TEST") == "file:///a$b"
