"""Tokens of one request as an engine gives them -> tokens, text and end as the client sees them.

Every engine ends an output by the same rules, here: at an end token, at a stop string, at the last
token there is room for. Else a request that goes on in a replica with another engine would end
elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.engine import FinishReason, GenerationRequest
from actors.engines.text import TextStream


@dataclass(frozen=True, slots=True)
class Taken:
    """The tokens that belong to the output, the text that is certain now, and why it ends."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None


class Output:
    """The output of one request so far; tells where it ends.

    `end_token_ids` end it, the token included, its text not.
    """

    def __init__(
        self, request: GenerationRequest, tokenizer: Any, eos_token_ids: frozenset[int]
    ) -> None:
        prompt, sampling = request.prompt_token_ids, request.sampling
        eos = frozenset() if sampling.ignore_eos else eos_token_ids
        self.end_token_ids = eos | frozenset(sampling.stop_token_ids)
        num_given = len(prompt) - request.num_output_so_far
        self._text = TextStream(tokenizer, prompt[:num_given], sampling.stop)
        for token in prompt[num_given:]:  # sent by another replica already
            self._text.feed(token)

    def take(self, tokens: Sequence[int], room: int) -> Taken:
        """What the next `tokens` add; at most `room` more belong to the output."""
        texts: list[str] = []
        finish: FinishReason | None = None
        num_taken = 0
        while finish is None and num_taken < len(tokens):
            finish = self._take_one(tokens[num_taken], texts)
            num_taken += 1
            if finish is None and num_taken == room:
                finish = "length"
        if finish is not None:
            texts.append(self.end())
        return Taken(tuple(tokens[:num_taken]), "".join(texts), finish)

    def end(self) -> str:
        """The text that was held back, when no more tokens come."""
        return "" if self._text.stopped else self._text.finish()

    def _take_one(self, token: int, texts: list[str]) -> FinishReason | None:
        if token in self.end_token_ids:
            return "stop"
        texts.append(self._text.feed(token))
        return "stop" if self._text.stopped else None
