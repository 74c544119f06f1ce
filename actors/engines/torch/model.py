"""A transformers decoder that computes KV into a paged pool, or a clear refusal.

A model whose attention differs from what the pool holds (sliding windows, other caches, positions
that depend on the batch) would run and produce wrong tokens. So only families that the tests
compare with plain transformers are accepted, and each condition has its own message.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actors.config import ModelSource
from actors.engines.tokenizer import eos_token_ids, load_tokenizer
from actors.engines.torch.attention import ATTENTION_NAME
from shared_cache.errors import ModelError
from shared_cache.namespace import BlockLayout

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

# Their angles depend on the longest sequence of the batch, so cached KV would not be reusable.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")

_DUMMY_SEED = 20


def check_config(config: Any, max_seq_len: int) -> None:
    """Raise `ModelError` unless the engine computes this model exactly up to `max_seq_len`."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"the embedded engine does not run {config.model_type!r} models; "
            f"it runs {', '.join(FAMILIES)}. Choose one of these"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("these weights are quantised; choose the unquantised ones of this model")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _BATCH_DEPENDENT_ROPE:
        raise ModelError(
            f"{rope_type!r} rotary positions change with the length of the batch, so KV cannot be "
            "shared; choose a model without them"
        )
    window = _sliding_window(config)
    if window is not None and window < max_seq_len:
        raise ModelError(
            f"this model attends over a sliding window of {window} tokens, the pool does not; "
            f"set engine.max_seq_len to at most {window}"
        )


def _sliding_window(config: Any) -> int | None:
    """The window of the layers that have one; None when every layer sees everything."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ModelError(f"layers of the kinds {sorted(kinds)} keep another cache than KV blocks")
    if kinds == {"full_attention"} and config.model_type != "mistral":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def block_layout(config: Any, tokens_per_block: int, dtype: str) -> BlockLayout:
    """The shape of one block of this model."""
    heads = config.num_attention_heads
    return BlockLayout(
        num_layers=config.num_hidden_layers,
        kv_factor=2,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        tokens_per_block=tokens_per_block,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights, tokenizer, and what ends a text. `max_seq_len` is what the model supports at most,
    or less when the settings say so.
    """

    network: Any
    tokenizer: Any
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_seq_len: int

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.network.config


def load_model(
    source: ModelSource,
    dtype: str = "float32",
    device: str = "cpu",
    max_seq_len: int | None = None,
    *,
    is_dummy: bool = False,
) -> LoadedModel:
    """The model at `source.path`, ready to run. Raises `ModelError` when that cannot be.

    `is_dummy`: with seeded random weights, made on the device; its folder then needs none.
    """
    path = Path(source.path)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model {source.name!r}: there is no config.json in {path}; "
            "give the folder of a model in the transformers format"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        supported = config.get_text_config().max_position_embeddings
        longest = min(max_seq_len or supported, supported)
        check_config(config, longest)
        if is_dummy:
            network = _dummy(config, getattr(torch, dtype), device)
        else:
            network = _read(path, config, getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {source.name!r} at {path} cannot be loaded: {error}") from error
    network = network.to(device).eval().requires_grad_(False)
    tokenizer = load_tokenizer(source)
    eos = eos_token_ids(network.generation_config, tokenizer)
    return LoadedModel(network, tokenizer, eos, config.vocab_size, longest)


def _read(path: Path, config: Any, dtype: torch.dtype) -> Any:
    with _without_progress_bar():
        return AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
        )


def _dummy(config: Any, dtype: torch.dtype, device: str) -> Any:
    """Random weights as the configuration says; the same ones in every process on such a device."""
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(_DUMMY_SEED)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Reading local weights is quick, and the terminal belongs to somebody else."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
