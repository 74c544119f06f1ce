"""Which fixed sizes of passes are captured, and which of them a pass is padded to.

A CUDA graph replays a pass of one size. Too few sizes waste work on padding, too many waste memory
and minutes at start. Pure.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = (1, 2, 4)
_STEP = 8
_COARSE_FROM = 64
_MIXED_SEQUENCES = (1, 8)


@dataclass(frozen=True, slots=True, order=True)
class PassSize:
    """Room for so many tokens of so many sequences."""

    num_tokens: int
    num_sequences: int


def token_steps(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24 and so on to 64, then half as much again or twice, up to `most`."""
    steps = [step for step in (*_STEPS, *range(_STEP, _COARSE_FROM + 1, _STEP)) if step < most]
    size = _COARSE_FROM
    while size < most:
        steps += [step for step in (size + size // 2, size * 2) if step < most]
        size *= 2
    return [*steps, most]


class PassSizes:
    """The sizes for at most `max_sequences` sequences and `max_tokens` tokens.

    Decoding has one token for each sequence, which gets the closest fit. Passes with longer spans
    (drafts, tails of prompts) get one of few numbers of sequences for each number of tokens.
    """

    def __init__(self, max_sequences: int, max_tokens: int) -> None:
        self._decode = token_steps(min(max_sequences, max_tokens))
        self._tokens = token_steps(max_tokens)
        few = [count for count in _MIXED_SEQUENCES if count < max_sequences]
        self._sequences = [*few, max_sequences]

    @property
    def all(self) -> list[PassSize]:
        """All sizes, the largest one first, so that smaller ones fit into its memory."""
        decode = {PassSize(count, count) for count in self._decode}
        mixed = {
            PassSize(tokens, sequences)
            for tokens in self._tokens
            for index, sequences in enumerate(self._sequences)
            if tokens > ([0, *self._sequences][index])
        }
        return sorted(decode | mixed, reverse=True)

    def smallest(self, counts: Sequence[int]) -> PassSize | None:
        """The size for spans of so many tokens each; None when there is none."""
        total = sum(counts)
        if total > self._tokens[-1] or len(counts) > self._sequences[-1]:
            return None
        if total == len(counts):
            step = _at_least(self._decode, total)
            return PassSize(step, step)
        return PassSize(_at_least(self._tokens, total), _at_least(self._sequences, len(counts)))


def _at_least(steps: Sequence[int], wanted: int) -> int:
    return steps[bisect_left(steps, wanted)]
