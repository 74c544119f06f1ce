"""Block hashes: the name of a block and of everything before it.

A block is named by SHA-256 over its parent's hash and its own token ids, so equal names mean equal
prefixes, in every process and on every machine (Python's own `hash` differs per process, and a hash
of one block's tokens alone would mix up different prefixes). The first parent is made from the
reuse scope, so that two tenants' chains have no name in common.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
"""32 bytes: SHA-256 of (parent hash, token ids as little-endian uint32)."""

HASH_BYTES = 32
TENANT_BYTES = 8
_ROOT_LABEL = b"kvcommons.root.v1\0"
_TENANT_LABEL = b"kvcommons.tenant.v1\0"

SCOPE_SEPARATOR = "\x1f"
"""In a cache salt: what follows makes the scope smaller, and the same tenant pays for it."""


@dataclass(frozen=True, slots=True)
class ReuseScope:
    """Who may reuse a block besides equal tokens: requests with an equal scope only.

    `cache_salt` keeps tenants apart, `lora_id` keeps adapters apart. Two scopes that differ in any
    field share no block hash.
    """

    cache_salt: str | None = None
    lora_id: str | None = None

    def root_hash(self) -> BlockHash:
        """The parent of the first block of every prompt in this scope."""
        digest = hashlib.sha256(_ROOT_LABEL)
        for field in (self.cache_salt, self.lora_id):
            encoded = b"\0" if field is None else b"\1" + field.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return BlockHash(digest.digest())

    def parent_of(self, hashes: Sequence[BlockHash], index: int) -> BlockHash:
        """What comes before block `index` of a prompt in this scope, whose blocks are `hashes`."""
        return hashes[index - 1] if index else self.root_hash()

    @property
    def tenant(self) -> bytes:
        """`TENANT_BYTES` bytes that name who pays for the blocks, empty for nobody.

        One value for each `cache_salt`, up to its first `SCOPE_SEPARATOR`.
        """
        if self.cache_salt is None:
            return b""
        payer = self.cache_salt.partition(SCOPE_SEPARATOR)[0]
        return hashlib.sha256(_TENANT_LABEL + payer.encode()).digest()[:TENANT_BYTES]


DEFAULT_SCOPE = ReuseScope()


class BlockHashChain:
    """The hashes of a growing token sequence's full blocks; append-only.

    `hashes[i]` covers tokens `[0, (i + 1) * tokens_per_block)`. Tokens beyond the last full block
    are kept until their block is full. Token ids must be in [0, 2**32); others raise
    `OverflowError`.
    """

    __slots__ = ("_root", "_tail", "hashes", "tokens_per_block")

    def __init__(
        self, tokens_per_block: int, scope: ReuseScope = DEFAULT_SCOPE, tokens: Iterable[int] = ()
    ) -> None:
        if tokens_per_block < 1:
            raise ValueError(f"tokens_per_block must be at least 1, not {tokens_per_block}")
        self.tokens_per_block = tokens_per_block
        self.hashes: list[BlockHash] = []
        self._root = scope.root_hash()
        self._tail = array("I")
        self.extend(tokens)

    def copy(self) -> "BlockHashChain":
        """The same so far, to be extended on its own."""
        chain = BlockHashChain(self.tokens_per_block)
        chain._root, chain._tail = self._root, self._tail[:]
        chain.hashes = self.hashes[:]
        return chain

    def first(self, prompt: Sequence[int]) -> "BlockHashChain":
        """The same for `prompt`, with which these tokens begin."""
        num_blocks = len(prompt) // self.tokens_per_block
        chain = BlockHashChain(self.tokens_per_block)
        chain._root, chain.hashes = self._root, self.hashes[:num_blocks]
        chain._tail = array("I", prompt[num_blocks * self.tokens_per_block :])
        return chain

    @property
    def num_tokens(self) -> int:
        """Tokens given so far, those of the unfinished block included."""
        return len(self.hashes) * self.tokens_per_block + len(self._tail)

    def parent_of(self, index: int) -> BlockHash:
        """The hash before block `index`: the scope's root for block 0."""
        return self.hashes[index - 1] if index else self._root

    def extend(self, tokens: Iterable[int]) -> None:
        """Append token ids; every block that becomes full gets its hash."""
        self._tail.extend(tokens)
        num_full = len(self._tail) // self.tokens_per_block
        if not num_full:
            return
        full = self._tail[: num_full * self.tokens_per_block]
        self._tail = self._tail[num_full * self.tokens_per_block :]
        if sys.byteorder == "big":
            full.byteswap()
        data, stride = full.tobytes(), self.tokens_per_block * full.itemsize
        parent = self.parent_of(len(self.hashes))
        for start in range(0, len(data), stride):
            parent = BlockHash(hashlib.sha256(parent + data[start : start + stride]).digest())
            self.hashes.append(parent)


def prompt_chain(
    prompt: tuple[int, ...], tokens_per_block: int, scope: ReuseScope = DEFAULT_SCOPE
) -> BlockHashChain:
    """The chain of a prompt, to be extended by whoever asks.

    The last few prompts are remembered: what stages a prompt and what computes it want the same,
    one after the other, and a long prompt takes milliseconds.
    """
    return _prompt_chain(prompt, tokens_per_block, scope).copy()


@lru_cache(maxsize=8)
def _prompt_chain(
    prompt: tuple[int, ...], tokens_per_block: int, scope: ReuseScope
) -> BlockHashChain:
    return BlockHashChain(tokens_per_block, scope, prompt)


def block_hashes(
    tokens: Iterable[int], tokens_per_block: int, scope: ReuseScope = DEFAULT_SCOPE
) -> Sequence[BlockHash]:
    """The hashes of all full blocks of `tokens`, first block first."""
    return BlockHashChain(tokens_per_block, scope, tokens).hashes


def next_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """The hash of the one full block `tokens` that follows `parent` (a scope's root, or a block).

    Token ids must be in [0, 2**32); others raise `OverflowError`.
    """
    data = array("I", tokens)
    if sys.byteorder == "big":
        data.byteswap()
    return BlockHash(hashlib.sha256(parent + data.tobytes()).digest())


def common_prefix_len(left: Sequence[BlockHash], right: Sequence[BlockHash]) -> int:
    """How many leading hashes are equal."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
