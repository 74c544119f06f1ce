"""What the double's model computes: KV and next tokens as functions of the whole token prefix.

A block that was loaded from another prefix, another scope, another rank, too early or too late
holds other bytes than these, so every such mistake is caught when a forward pass reads it.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared_cache.namespace import BlockLayout

State = bytes
"""Names a token sequence and its scope."""

VOCABULARY = 50_000
ITEM_BYTES = 4

LAYOUT = BlockLayout(
    num_layers=2, kv_factor=2, num_kv_heads=1, tokens_per_block=4, head_dim=1, dtype="float32"
)
"""Two layers, so that the order of layer hooks shows; blocks of 64 bytes."""

PLANES = LAYOUT.num_layers * LAYOUT.kv_factor * LAYOUT.num_kv_heads
TOKEN_BYTES = PLANES * LAYOUT.head_dim * ITEM_BYTES


def first_state(scope: object) -> State:
    """The state before the first token of a request in `scope`."""
    return hashlib.blake2b(repr(scope).encode(), digest_size=16).digest()


def next_state(state: State, token: int) -> State:
    """The state after one more token."""
    return hashlib.blake2b(state + token.to_bytes(4, "little"), digest_size=16).digest()


def next_token(state: State) -> int:
    """What the model says after a sequence in `state`."""
    return int.from_bytes(state[:4], "little") % VOCABULARY


@lru_cache(maxsize=200_000)
def kv_of(states: tuple[State, ...], rank: int) -> npt.NDArray[np.uint8]:
    """KV of consecutive tokens of one block on one rank, `[planes, tokens, bytes]`.

    `states[i]` is the state after token i.
    """
    key = rank.to_bytes(2, "little")
    tokens = b"".join(
        hashlib.blake2b(state, key=key, digest_size=TOKEN_BYTES).digest() for state in states
    )
    by_token = np.frombuffer(tokens, np.uint8).reshape(len(states), PLANES, -1)
    return np.ascontiguousarray(by_token.transpose(1, 0, 2))


class Trail:
    """The states of a growing token sequence: `states[i]` is the one after token i.

    `media` are a place among the tokens, and what decides the KV from there on besides them.
    """

    def __init__(
        self, scope: object, tokens: Iterable[int], media: tuple[int, str] | None = None
    ) -> None:
        self.root = first_state(scope)
        self._media = media
        self.states: list[State] = []
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token."""
        before = self.states[-1] if self.states else self.root
        if self._media is not None and self._media[0] == len(self.states):
            before = first_state((before, self._media[1]))
        self.states.append(next_state(before, token))

    def block(self, index: int, size: int, stop: int | None = None) -> tuple[State, ...]:
        """The states of block `index`, of those tokens before `stop`."""
        end = (index + 1) * size
        return tuple(self.states[index * size : end if stop is None else min(end, stop)])


def block_bytes(trail: Trail, index: int, rank: int = 0) -> bytes:
    """All bytes of a full block, as they lie in pool, host memory and store."""
    return kv_of(trail.block(index, LAYOUT.tokens_per_block), rank).tobytes()
