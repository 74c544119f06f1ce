"""Prompts for whichever model a user names: its tokenizer, its chat template, its length.

A text that fits one model is too long for another and has another number of tokens. Everything
that the demo sends is cut here, in tokens of the model that reads it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from actors.config import EngineConfig, ModelSource
from shared_cache.errors import ConfigError, ModelError

FALLBACK_MAX_TOKENS = 2048


class Message(TypedDict):
    """One turn of a conversation, as OpenAI's API names it."""

    role: Literal["system", "user", "assistant"]
    content: str


def model_max_tokens(model: ModelSource, engine: EngineConfig) -> int:
    """The longest prompt plus output, in tokens, by the engine's settings and the model's."""
    config = json.loads((Path(model.path) / "config.json").read_text())
    of_model = int(config.get("max_position_embeddings") or FALLBACK_MAX_TOKENS)
    return min(of_model, engine.max_seq_len or of_model)


class Prompts:
    """Turns text and conversations into token ids of one model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of_model(cls, model: ModelSource) -> "Prompts":
        """Reads the tokenizer of `model`; raises `ModelError` when it cannot be loaded."""
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(model.path))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the tokenizer in {model.path}: {error}") from error

    def text(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        """`text` as it is, cut to its first `max_tokens` tokens."""
        return tuple(self._tokenizer.encode(text))[:max_tokens]

    def chat(self, messages: Sequence[Message], answer_start: str = "") -> tuple[int, ...]:
        """The conversation, ready for the model's answer, which begins with `answer_start`.

        Uses the model's chat template, or plain `User:`/`Assistant:` lines when it has none.
        """
        if self._tokenizer.chat_template is None:
            lines = [f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages]
            return self.text("".join(lines) + "Assistant: " + answer_start)
        rendered = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        return tuple(self._tokenizer.encode(rendered + answer_start, add_special_tokens=False))

    def num_tokens(self, text: str) -> int:
        """How many tokens `text` is, without special ones."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def cut(self, text: str, num_tokens: int) -> str:
        """The beginning of `text` that is about `num_tokens` tokens long, ending with a word."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= num_tokens:
            return text
        kept: str = self._tokenizer.decode(ids[:num_tokens], skip_special_tokens=True)
        words, blank, _ = kept.rpartition(" ")
        return words if blank else kept

    def about(
        self, text: str, ask: Callable[[str], tuple[int, ...]], max_tokens: int
    ) -> tuple[int, ...]:
        """`ask(text)`, with `text` cut as far as is needed to stay within `max_tokens`.

        Raises `ConfigError` when not even the empty text does.
        """
        ids = ask(text)
        length = self.num_tokens(text)
        while len(ids) > max_tokens:
            if length <= 0:
                raise ConfigError(
                    f"a prompt without any text is {len(ids)} tokens long already, but max_seq_len "
                    f"or the pool leave {max_tokens}; raise them"
                )
            length -= max(1, len(ids) - max_tokens)
            ids = ask(self.cut(text, length) if length > 0 else "")
        return ids
