"""Log-probabilities of the tokens of one request, noted while they are chosen.

They come from the model's own distribution, before temperature and limits. Noting them wraps the
choice of a token, so that neither the forward pass nor the other requests of a batch know of it.
"""

from collections.abc import Callable

import torch

from actors.engine import TokenLogprob


def greedy(logits: torch.Tensor, _: int) -> int:
    """The likeliest token from one row of logits `[vocab]`."""
    return int(logits.max(dim=-1).indices)


class LogprobNotes:
    """Wraps how a request's tokens are chosen; `num_top` likeliest tokens are noted for each.

    For the engine's thread. What was noted belongs to the tokens of one turn, in their order.
    """

    def __init__(self, choose: Callable[[torch.Tensor, int], int], num_top: int) -> None:
        self._choose = choose
        self._num_top = num_top
        self._noted: list[TokenLogprob] = []

    def __call__(self, logits: torch.Tensor, position: int) -> int:
        """Choose from one row of logits `[vocab]`, and note."""
        token = self._choose(logits, position)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        top = torch.topk(logprobs, min(self._num_top, logprobs.numel()))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        self._noted.append(TokenLogprob(float(logprobs[token]), tuple(pairs)))
        return token

    def take(self, num_tokens: int) -> tuple[TokenLogprob, ...]:
        """Those of the first `num_tokens` tokens of this turn; the rest is forgotten."""
        noted, self._noted = self._noted, []
        return tuple(noted[:num_tokens])
