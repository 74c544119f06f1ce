"""How much KV memory the booked requests of one replica need: what they share counts once.

Agents and questions about one document run beside each other on the same prefix. Summing up whole
prompts would take a replica for full that has most of its memory free.
"""

from collections.abc import Sequence

COUNTED_TOKENS = 256
"""Keys that lie closer than this are not all counted; it only makes the sum coarser."""


class PinnedTokens:
    """The distinct tokens of the requests of one replica, told apart by their keys.

    With `tokens_per_key` 0 nothing is known of what is shared, and everything counts.
    """

    def __init__(self, tokens_per_key: int) -> None:
        self._step = max(1, COUNTED_TOKENS // tokens_per_key) if tokens_per_key else 0
        self._tokens = self._step * tokens_per_key
        self._counts: dict[int, int] = {}

    def add(self, keys: Sequence[int], num_tokens: int) -> int:
        """A request of so many tokens begins with these blocks; how many tokens are new."""
        if not self._step:
            return num_tokens
        counts, shared = self._counts, 0
        for key in keys[self._step - 1 :: self._step]:
            count = counts.get(key, 0)
            counts[key] = count + 1
            shared += count > 0
        return max(0, num_tokens - shared * self._tokens)

    def remove(self, keys: Sequence[int], num_tokens: int) -> int:
        """It has ended; how many tokens nobody needs any more."""
        if not self._step:
            return num_tokens
        counts, shared = self._counts, 0
        for key in keys[self._step - 1 :: self._step]:
            count = counts[key] - 1
            if count:
                counts[key] = count
                shared += 1
            else:
                del counts[key]
        return max(0, num_tokens - shared * self._tokens)
