"""A model's tokenizer and the tokens that end a text, the same for every engine."""

from typing import Any

from transformers import AutoTokenizer

from actors.config import ModelSource
from shared_cache.errors import ModelError


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer beside the weights; raises `ModelError` when there is none."""
    try:
        return AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {source.name!r} has no tokenizer in {source.path} ({error}); "
            "copy tokenizer.json and tokenizer_config.json of the model there"
        ) from error


def eos_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text: those of the generation settings and the tokenizer's own."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
