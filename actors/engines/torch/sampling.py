"""Which token comes next, given the logits.

Random draws are keyed by (seed, position of the token in the whole sequence) instead of taken from
a generator's state. So the same request draws the same tokens whoever shares its batch, whether
drafts were verified or not, and on whichever replica it continues.
"""

import hashlib

import torch

from actors.engine import SamplingParams

_MANTISSA_BITS = 53
_USUAL_NUCLEUS = 1024


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the two arguments."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _MANTISSA_BITS)) / (1 << _MANTISSA_BITS)


def sample(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """The token for `position` from one row of float logits `[vocab]`; not for a
    temperature below `GREEDY_TEMPERATURE`.

    `top_k`, then `top_p` cut the distribution (at least one token stays); the draw inverts the
    cumulative distribution.
    """
    logits = logits.float()
    probabilities = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
    kept, tokens = _candidates(probabilities, params)
    cumulative = kept.cumsum(0, dtype=torch.float64)
    if params.top_p < 1:
        # The first token that reaches top_p is the last one that stays.
        mass = float(cumulative[-1]) if params.top_k else 1.0
        reached = torch.searchsorted(cumulative, params.top_p * mass)
        cumulative = cumulative[: int(reached) + 1]
    target = uniform(seed, position) * float(cumulative[-1])
    index = min(int(torch.searchsorted(cumulative, target, right=True)), len(cumulative) - 1)
    return index if tokens is None else int(tokens[index])


def _candidates(
    probabilities: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities that may be drawn and their token ids, ranked only as far as needed.

    Ranking a whole vocabulary costs milliseconds per token, so it is done only when the nucleus is
    wider than `_USUAL_NUCLEUS` tokens. Without limits no ranking is needed: ids are indices (None).
    """
    vocab_size = probabilities.numel()
    if 0 < params.top_k < vocab_size:
        ranked, tokens = torch.topk(probabilities, params.top_k)
        return ranked, tokens
    if params.top_p == 1:
        return probabilities, None
    ranked, tokens = torch.topk(probabilities, min(_USUAL_NUCLEUS, vocab_size))
    if float(ranked.sum()) <= params.top_p:
        ranked, tokens = torch.sort(probabilities, descending=True)
    return ranked, tokens
