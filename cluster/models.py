"""From a name that a person types to weights on this machine and the digest that identifies them.

Two replicas may share blocks only when they run the same weights. A name cannot promise that: a
folder is overwritten, a branch moves. So every way in (alias, folder, hub id) ends in a
`ModelSource` whose `revision` is derived from content or is a commit, never from the name; and
what is missing is said here, before any actor starts.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from actors.config import ModelSource
from cluster.model_progress import Preparation
from cluster.model_wheel import resolve_smollm2
from shared_cache.errors import ModelError
from shared_cache.model_digest import content_digest, default_cache_dir, weight_files

ALIASES: dict[str, Callable[[Path], ModelSource]] = {"smollm2-135m": resolve_smollm2}
"""Names that stand for a model which is fetched and prepared when first used."""

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_model(name_or_path: str, cache_dir: Path | None = None) -> ModelSource:
    """The model that `name_or_path` means, ready on this machine.

    Tried in this order: an alias, an existing local folder, a Hugging Face hub id. May download
    (with a progress bar when attached to a terminal). Raises `ModelError` whose text says what is
    missing and how to mend it.
    """
    cache = cache_dir if cache_dir is not None else default_cache_dir()
    if name_or_path in ALIASES:
        return ALIASES[name_or_path](cache)
    local = Path(name_or_path).expanduser()
    if local.exists():
        return _resolve_local(local, cache)
    if HUB_ID.fullmatch(name_or_path):
        return _resolve_hub(name_or_path)
    known = ", ".join(sorted(ALIASES))
    raise ModelError(
        f"no model {name_or_path!r}: it is no folder on this machine, no hub id (those look like "
        f"'owner/name') and no alias (known: {known})"
    )


def _resolve_local(folder: Path, cache_dir: Path) -> ModelSource:
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is a file; a model is a folder with config.json, *.safetensors and "
            "tokenizer files, as `save_pretrained` of transformers writes it"
        )
    missing = _missing_parts(folder)
    if missing:
        raise ModelError(
            f"{folder} is not a complete model: it lacks {', '.join(missing)}; copy the missing "
            "files there, or write the folder again with transformers' `save_pretrained`"
        )
    resolved = folder.resolve()
    revision = content_digest(resolved, weight_files(resolved), cache_dir, _shown(resolved.name))
    return ModelSource(name=resolved.name, path=str(resolved), revision=revision)


def _shown(model: str) -> Callable[[str], AbstractContextManager[None]]:
    """Shows, with a display of its own for each, the steps of preparing `model`."""

    @contextmanager
    def show(what: str) -> Iterator[None]:
        with Preparation(model) as progress, progress.step(what):
            yield

    return show


def _missing_parts(folder: Path) -> list[str]:
    parts = {
        "config.json": (folder / "config.json").is_file(),
        "weights (*.safetensors or pytorch_model*.bin)": bool(weight_files(folder)),
        "a tokenizer (tokenizer.json)": any((folder / name).is_file() for name in TOKENIZER_FILES),
    }
    return [part for part, is_there in parts.items() if not is_there]


def _resolve_hub(hub_id: str) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:  # but for a malformed id, every error of the hub is an OSError
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (
        OSError,
        HFValidationError,
    ) as error:
        raise ModelError(
            f"{hub_id!r} is no folder on this machine and could not be had from the Hugging Face "
            f"hub ({type(error).__name__}: {error}). Without a network: copy the model's folder to "
            "this machine and name its path, or use smollm2-135m. If it is a gated model: accept "
            "its licence on the hub and run `hf auth login`"
        ) from error
    missing = _missing_parts(folder)
    if missing:
        raise ModelError(
            f"the hub's {hub_id!r} cannot be run here: it has no {' and no '.join(missing)}"
        )
    return ModelSource(name=hub_id, path=str(folder), revision=folder.name)
