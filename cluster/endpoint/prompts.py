"""Text to tokens, in the ingress: with the model's own tokeniser and chat template.

Tokens, not text, are what is hashed, routed and stored; so they are made once, before routing.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from shared_cache.errors import RequestError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PromptEncoder:
    """The tokeniser of the model in `path`; thread-safe.

    No token stands for more than `longest_token_chars` characters.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._encode = _encoding(self._tokenizer)
        self._byte_of = _byte_level(self._tokenizer)
        self._special = dict(
            zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=True)
        )
        self.longest_token_chars = max(map(len, self._tokenizer.get_vocab()))
        self.token_bytes = lru_cache(1 << 16)(self._token_bytes)

    @property
    def probe(self) -> tuple[int, ...]:
        """The shortest prompt: one token, less than a block, so that nothing of it is kept."""
        return (self._tokenizer.bos_token_id or self._tokenizer.eos_token_id or 0,)

    def text(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The tokens of a plain prompt; raises `RequestError` for an empty one."""
        tokens = tuple(self._encode(text, add_special_tokens))
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token")
        return tokens

    def chat(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """The tokens of a conversation, ready for the assistant's answer.

        Raises `RequestError` when the model's template does not take it.
        """
        if self._tokenizer.chat_template is None:
            raise RequestError("this model has no chat template; use /v1/completions")
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=True,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise RequestError(f"the model's chat template refuses this: {error}") from error
        return tuple(encoded["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included; raises `RequestError` for unknown ones."""
        unknown = next((one for one in tokens if one >= len(self._tokenizer)), None)
        if unknown is not None:
            raise RequestError(
                f"token id {unknown} is outside this tokenizer's {len(self._tokenizer)} tokens"
            )
        text: str = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    def _token_bytes(self, token: int) -> bytes:
        """The bytes of one token's text; of a special one its name."""
        name = self._special.get(token)
        if name is None:
            name = self._tokenizer.convert_ids_to_tokens(token) or ""
            if self._byte_of and all(char in self._byte_of for char in name):
                return bytes(self._byte_of[char] for char in name)
            byte = _BYTE_TOKEN.fullmatch(name)
            if byte is not None:
                return bytes([int(byte[1], 16)])
            name = name.replace("▁", " ")
        return str(name).encode()


def _encoding(tokenizer: Any) -> Callable[[str, bool], Sequence[int]]:
    """Text and whether special tokens are added -> tokens, by the shortest way there is.

    The general one costs more than a short prompt.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text, special: tokenizer(text, add_special_tokens=special)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    return lambda text, special: backend.encode(text, add_special_tokens=special).ids


def _byte_level(tokenizer: Any) -> dict[str, int]:
    """What each character of a byte-level vocabulary stands for; empty for other vocabularies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" not in repr(backend.decoder):
        return {}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    return dict(zip(chars, [*printable, *others], strict=True))
