"""Drafts by prompt look-up: what followed the last few tokens when they occurred before.

Text that is edited or summarised repeats its source, so the next tokens can often be copied
instead of computed one by one. A draft is only a guess: the engine verifies it in one forward pass,
so a bad one costs time, never a wrong token. The index grows with the sequence, so a turn costs
O(new tokens) however long the context is.
"""

from collections.abc import Iterable

_SHORTEST_NGRAM = 2
"""One token alone is poor evidence: on prose that repeats nothing, drafts from single tokens cost
10 to 17 % of the speed, those from two or three tokens 3 to 5 %."""


class PromptLookup:
    """Drafts for one growing sequence.

    N-grams of `max_ngram_size` down to 2 tokens (or 1, when that is the maximum) are looked up,
    the longest and most recent occurrence wins.
    """

    def __init__(self, max_ngram_size: int, tokens: Iterable[int] = ()) -> None:
        self._sizes = range(max_ngram_size, min(_SHORTEST_NGRAM, max_ngram_size) - 1, -1)
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens of the sequence, those verified only."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def draft(self, max_draft_len: int) -> list[int]:
        """Up to `max_draft_len` tokens that may come next; empty when nothing matches.

        A match that ends close to the end of the sequence is a repetition, and is continued as
        one: the draft wraps around instead of being cut short.
        """
        start = self._find()
        if start is None:
            return []
        period = len(self._tokens) - start
        return [self._tokens[start + i % period] for i in range(max_draft_len)]

    def _find(self) -> int | None:
        for size in self._sizes:
            start = self._after.get(tuple(self._tokens[-size:]))
            if start is not None:
                return start
        return None
