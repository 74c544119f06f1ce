"""A transformers decoder that computes KV into a paged pool, or a clear refusal.

A model whose attention differs from what the pool holds (sliding windows, other caches, positions
that depend on the batch) would run and produce wrong tokens. So only families that the tests
compare with plain transformers are accepted, and each condition has its own message.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actors.config import ModelSource
from actors.engines.tokenizer import eos_token_ids, load_tokenizer
from actors.engines.torch.attention import ATTENTION_NAME, PagedPass, PagedPool
from shared_cache.errors import ConfigError, ModelError
from shared_cache.namespace import BlockLayout

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

# Their angles depend on the longest sequence of the batch, so cached KV would not be reusable.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


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


def allocate_pool(layout: BlockLayout, num_slots: int, device: str) -> PagedPool:
    """A zeroed pool; memory is taken as slots are first written where the system allows.

    Raises `ConfigError` with the size when the device has not that much memory.
    """
    try:
        tensor = torch.zeros(
            (num_slots, *layout.shape), dtype=getattr(torch, layout.dtype), device=device
        )
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        raise ConfigError(
            f"a pool of {num_slots} blocks takes {num_slots * layout.block_bytes / 2**30:.1f} GiB, "
            f"which {device} does not have; lower engine.kv_cache_config.max_tokens"
        ) from error
    return PagedPool(tensor, layout)


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

    def logits(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        paged: PagedPass,
        rows: Sequence[int],
    ) -> torch.Tensor:
        """Logits `[len(rows), vocab]` of the chosen rows of one packed pass over the pool."""
        device = self.network.device
        hidden = self.network.model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            paged=paged,
        ).last_hidden_state[0]
        if len(rows) < len(hidden):
            hidden = hidden[torch.tensor(rows, dtype=torch.long, device=device)]
        logits: torch.Tensor = self.network.lm_head(hidden)
        return logits


def load_model(
    source: ModelSource, dtype: str = "float32", device: str = "cpu", max_seq_len: int | None = None
) -> LoadedModel:
    """The model at `source.path`, ready to run. Raises `ModelError` when that cannot be."""
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
        with _without_progress_bar():
            network = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {source.name!r} at {path} cannot be loaded: {error}") from error
    network = network.to(device).eval().requires_grad_(False)
    tokenizer = load_tokenizer(source)
    eos = eos_token_ids(network.generation_config, tokenizer)
    return LoadedModel(network, tokenizer, eos, config.vocab_size, longest)


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
