"""Log-probabilities of tokens in OpenAI's two shapes.

A token may be part of a character only, so beside its text, which then is a replacement character,
its bytes are told.
"""

from collections.abc import Callable, Sequence
from typing import Any

from actors.engine import TokenChunk

TokenBytes = Callable[[int], bytes]
"""The bytes of the text that one token stands for."""


class Logprobs:
    """Makes one chunk's log-probabilities; joins those of a whole answer."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes

    def completion(self, chunk: TokenChunk, num_chars: int) -> tuple[dict[str, Any], int]:
        """For `/v1/completions`, and how many characters the choice has then; now `num_chars`."""
        offsets = []
        for token in chunk.token_ids:
            offsets.append(num_chars)
            num_chars += len(self._text(token))
        part = {
            "tokens": [self._name(token) for token in chunk.token_ids],
            "token_logprobs": [one.logprob for one in chunk.logprobs],
            "top_logprobs": [
                {self._name(token): logprob for token, logprob in one.top} for one in chunk.logprobs
            ],
            "text_offset": offsets,
        }
        return part, num_chars

    def chat(self, chunk: TokenChunk, num_chars: int) -> tuple[dict[str, Any], int]:
        """For `/v1/chat/completions`; `num_chars` as it was."""
        content = []
        for token, one in zip(chunk.token_ids, chunk.logprobs, strict=True):
            top = [self._named(other, logprob) for other, logprob in one.top]
            content.append({**self._named(token, one.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}, num_chars

    @staticmethod
    def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Those of several chunks in a row, in either shape; None for none."""
        if not parts:
            return None
        return {
            name: [item for part in parts for item in part[name]] if value is not None else None
            for name, value in parts[0].items()
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._bytes(token)
        text = data.decode(errors="replace")
        return {"token": text, "bytes": list(data), "logprob": logprob}

    def _name(self, token: int) -> str:
        """Its text; if that is no whole characters, its bytes, as OpenAI writes them."""
        data = self._bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _text(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")
