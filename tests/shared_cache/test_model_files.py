"""An engine's model on this machine: found, read, and told from every other one."""

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared_cache import model_digest
from shared_cache.connector.model_files import find_folder, read_model
from shared_cache.connector.trtllm_config import ConnectorConfig, KvLayoutConfig
from shared_cache.errors import ConfigError, ModelError
from shared_cache.model_digest import content_digest, weight_files
from tests.shared_cache.trtllm_doubles import LLAMA, save_model

WHOLE = KvLayoutConfig(num_layers=2, kv_factor=2, num_kv_heads=2, head_dim=8, dtype="float16")


@pytest.fixture(autouse=True)
def users_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the caches of the user who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KVCOMMONS_CACHE_DIR", str(folder))
    return folder


def args(model: object, revision: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(model=str(model), revision=revision)


def test_the_same_weights_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    one, two = save_model(tmp_path / "one"), save_model(tmp_path / "two")
    other = save_model(tmp_path / "other", fill=1.0)
    revisions = [read_model(args(folder), ConnectorConfig())[1] for folder in (one, two, other)]
    assert revisions[0] == revisions[1] != revisions[2]
    found, _ = read_model(args(one), ConnectorConfig())
    assert found.config == LLAMA
    assert found.hf_quant_config == {}


def test_quantisation_files_are_read(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    found, _ = read_model(args(folder), ConnectorConfig())
    assert found.hf_quant_config["quantization"]["quant_algo"] == "FP8"


@pytest.mark.parametrize("content", ["{cut", "[]"])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: str) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "hf_quant_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json.*copy the model again"):
        read_model(args(folder), ConnectorConfig())


def test_a_revision_that_is_given_spares_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "m")
    monkeypatch.setattr(model_digest, "_read_digest", lambda file, memory: pytest.fail("read"))
    assert read_model(args(folder), ConnectorConfig(revision="r1"))[1] == "r1"


def test_weights_are_read_once_in_a_process_even_if_nothing_can_be_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reads = save_model(tmp_path / "m"), []
    read = model_digest._read_digest
    monkeypatch.setattr(
        model_digest, "_read_digest", lambda *given: reads.append(given) or read(*given)
    )
    first = read_model(args(folder), ConnectorConfig())
    assert read_model(args(folder), ConnectorConfig()) == first
    assert len(reads) == 1


def test_a_model_that_is_nowhere_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the path of the model's folder.*kv_layout"):
        find_folder(args(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="not a/valid/id"):
        find_folder(args("not a/valid/id"))
    config = ConnectorConfig(revision="r", kv_layout=WHOLE)
    found, revision = read_model(args(tmp_path / "gone"), config)
    assert (dict(found.config), revision) == ({}, "r")
    with pytest.raises(ConfigError, match="set, in the connector's YAML, revision"):
        read_model(args(tmp_path / "gone"), ConnectorConfig(kv_layout=WHOLE))


def test_a_folder_without_weights_is_explained(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights.*set revision"):
        read_model(args(folder), ConnectorConfig())


@pytest.mark.parametrize("name", ["weights.bin", "consolidated.00.pth"])
def test_pickled_weights_of_any_name_count(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"one")
    first = read_model(args(folder), ConnectorConfig())[1]
    (folder / name).write_bytes(b"other")
    assert read_model(args(folder), ConnectorConfig())[1] != first


def hub_model(home: Path, name: str, commit: str) -> Path:
    """A model as the Hugging Face hub's cache holds it, under its main branch."""
    place = home / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    return save_model(place / "snapshots" / commit)


def test_a_hub_id_means_its_copy_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hub_model(tmp_path, "owner/name", commit)
    for revision in (None, "main", commit):
        assert find_folder(args("owner/name", revision)) == folder
    assert find_folder(args("owner/name", "other"), is_needed=False) is None


def _digest_in_child(folder: Path, cache: Path, log: Path, barrier: object) -> None:
    read = model_digest._read_digest

    def noted(file: Path, memory: Path) -> str:
        with log.open("a") as out:
            out.write("read\n")
        return read(file, memory)

    model_digest._read_digest = noted
    model_digest.SETTLED_S = -60.0
    barrier.wait()  # type: ignore[attr-defined]
    content_digest(folder, weight_files(folder), cache)


def test_ranks_that_start_together_read_the_weights_once(tmp_path: Path) -> None:
    folder, log = save_model(tmp_path / "m"), tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    ranks = [
        context.Process(target=_digest_in_child, args=(folder, tmp_path / "c", log, barrier))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert log.read_text().splitlines() == ["read"]
    assert json.loads(next((tmp_path / "c/digests").iterdir()).read_text())["sha256"]
