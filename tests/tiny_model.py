"""Tiny random models with a byte-level tokenizer: real transformers models, run in milliseconds.

Their weights are spread widely, so that the most probable token is far from the second and greedy
output does not depend on the order of sums.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from actors.config import ModelSource

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so characters beyond ASCII are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """The configuration of a tiny model of one family."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "sliding_window": None,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family == "smollm3":  # every second layer has no rotary positions
        settings |= {"no_rope_layer_interval": 2, "num_hidden_layers": 4}
    return AutoConfig.for_model(family, **(settings | changes))


def make_tiny_model(path: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a seeded random model and its tokenizer to `path`; `changes` go to its config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def tiny_source(path: Path) -> ModelSource:
    """The source of a model that `make_tiny_model` wrote."""
    weights = (Path(path) / "model.safetensors").read_bytes()
    return ModelSource(
        name="tiny", path=str(path), revision=hashlib.sha256(weights).hexdigest()[:16]
    )
