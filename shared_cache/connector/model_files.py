"""An engine's model on this machine: its folder, its JSON files, and what identifies its weights.

The identity is a digest of every byte of the weights. A name or a path would do until the day when
somebody overwrites the folder, and from then on engines would attend to each other's blocks.
"""

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_cache.connector.trtllm_config import ConnectorConfig, KvLayoutConfig
from shared_cache.connector.trtllm_facts import ModelFiles
from shared_cache.connector.trtllm_values import read
from shared_cache.errors import ConfigError, ModelError
from shared_cache.model_digest import content_digest, default_cache_dir, weight_files

logger = logging.getLogger(__name__)

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pth")
"""What TensorRT-LLM loads: the files of the first pattern that any file matches."""

NO_FILES = ModelFiles({}, {}, {})

_FileId = tuple[str, int, int, int]
_lock = threading.Lock()
_digests: dict[tuple[Path, tuple[_FileId, ...]], str] = {}
"""Digests computed by this process; both sides of a connector need the same one."""


def read_model(llm_args: Any, config: ConnectorConfig) -> tuple[ModelFiles, str]:
    """The JSON files of the engine's model, and what identifies its weights.

    May read all weights, which takes minutes for a large model; the result is remembered. Raises
    `ConfigError` or `ModelError`, with the fix, when the folder is not there or not complete.
    """
    if config.revision is not None and _is_told_whole(config.kv_layout):
        folder = find_folder(llm_args, is_needed=False)
        return (NO_FILES if folder is None else _read_files(folder)), config.revision
    folder = find_folder(llm_args)
    assert folder is not None
    return _read_files(folder), config.revision or _digest(folder)


def find_folder(llm_args: Any, *, is_needed: bool = True) -> Path | None:
    """Where the model lies: the folder that `model` names, or its copy in the hub's cache.

    Asks no network. None, or `ConfigError` if it `is_needed`, when there is no such folder.
    """
    name = str(read(llm_args, "model", ""))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    cached = None if folder.is_absolute() else _in_hub_cache(name, read(llm_args, "revision"))
    if cached is not None or not is_needed:
        return cached
    raise ConfigError(
        f"no config.json of the model {name!r} on this machine, in a folder of that name or in the "
        "Hugging Face cache: give TensorRT-LLM the path of the model's folder; or set, in the "
        "connector's YAML, revision and all of kv_layout"
    )


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    # The file is a link; its folder is the snapshot that has the weights, too.
    return Path(found).parent if isinstance(found, str) else None


def _is_told_whole(layout: KvLayoutConfig | None) -> bool:
    return layout is not None and None not in layout.model_dump().values()


def _read_files(folder: Path) -> ModelFiles:
    names = ("config.json", "hf_quant_config.json", "quant_cfg.json")
    return ModelFiles(*(_read_json(folder / name) for name in names))


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); copy the model again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no settings; copy the model again")
    return values


def _digest(folder: Path) -> str:
    files = weight_files(folder, WEIGHT_PATTERNS)
    if not files:
        raise ModelError(
            f"{folder} holds no weights ({', '.join(WEIGHT_PATTERNS)}), so nothing tells it from "
            "another model; copy them there, or set revision in the connector's YAML"
        )
    key = folder, tuple(map(_file_id, files))
    with _lock:
        if key not in _digests:
            _digests[key] = content_digest(folder, files, default_cache_dir())
        return _digests[key]


def _file_id(file: Path) -> _FileId:
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino
