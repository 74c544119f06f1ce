"""Tokens to text while they come out, and the end of the text at a stop string.

Two things must not leak to a client: half a character (a token may hold one byte of several), and
the beginning of a stop string that is completed later. Both are held back until they are certain.
Tokens are fed one by one, so the text is the same however many tokens a turn brings, and a request
that continues on another replica gets the same state by feeding its earlier tokens again.
"""

from collections.abc import Sequence
from typing import Any

_CONTEXT_TOKENS = 6
_LONGEST_CHARACTER_TOKENS = 8
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one request's output.

    `context` are the tokens before the output: whether a token starts with a space may depend on
    them.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(context[-_CONTEXT_TOKENS:])
        self._prefix_start = 0
        self._num_read = len(self._tokens)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain after one more token; sets `stopped` at a stop string."""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back, when the output ends without a stop string."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        known = self._decode(self._tokens[self._prefix_start : self._num_read])
        text = self._decode(self._tokens[self._prefix_start :])
        num_unread = len(self._tokens) - self._num_read
        incomplete = text.endswith(_INCOMPLETE) and num_unread < _LONGEST_CHARACTER_TOKENS
        if len(text) <= len(known) or (incomplete and not final):
            return ""
        self._prefix_start = self._num_read
        self._num_read = len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, text: str, final: bool) -> str:
        """Text before the first stop string, less what may become one."""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = 0 if final else self._num_ambiguous()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def _num_ambiguous(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
