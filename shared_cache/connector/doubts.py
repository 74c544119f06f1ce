"""Blocks that an engine may take for computed though nobody computed them. Pure.

TensorRT-LLM frees a sequence by putting blocks for all its tokens but the last into its reuse tree,
however far its prefill came: after a cancellation or a failed pass there are blocks in the tree
that hold anything. The next request of that prefix gets them as its device prefix. What is computed
behind them is garbage under a right name; saved, it would be wrong for everybody and for good.
"""

from collections import OrderedDict
from itertools import islice

from shared_cache.hashing import BlockHash, BlockHashChain

MAX_PREFIXES = 1 << 16
"""Ended requests whose uncomputed blocks are remembered; the oldest is forgotten first."""


def reaches_into(chain: BlockHashChain, num_tokens: int, other: BlockHashChain, start: int) -> bool:
    """Whether the first `num_tokens` tokens of `chain` use blocks of `other` from `start` on.

    A hash names all that is before its block, so looking at block `start` is enough: who shares a
    later one shares that one. Tokens beyond a full block were copied out of any block with the same
    parent (partial reuse).
    """
    num_full, num_beyond = divmod(num_tokens, chain.tokens_per_block)
    if start < min(num_full, len(chain.hashes), len(other.hashes)):
        return chain.hashes[start] == other.hashes[start]
    is_beside = num_beyond > 0 and start == num_full <= min(len(chain.hashes), len(other.hashes))
    return is_beside and chain.parent_of(start) == other.parent_of(start)


class DoubtfulBlocks:
    """Where the uncomputed blocks of ended requests begin, in one engine's reuse tree.

    One hash for each of these requests, with its parent, is all that it takes: see `reaches_into`.
    """

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        self._parents: OrderedDict[BlockHash, BlockHash] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parents)

    def add(self, chain: BlockHashChain, start: int) -> None:
        """Block `start` of `chain`, and all that hangs on it, may be in the tree uncomputed."""
        name = chain.hashes[start]
        self._parents[name] = chain.parent_of(start)
        self._parents.move_to_end(name)
        if len(self._parents) > self._max_prefixes:
            self._parents.popitem(last=False)

    def are_in(self, chain: BlockHashChain, num_tokens: int) -> bool:
        """Whether a device prefix of so many tokens may hold any of them."""
        if not self._parents:
            return False
        num_full, num_beyond = divmod(num_tokens, chain.tokens_per_block)
        for name in islice(chain.hashes, num_full):
            if name in self._parents:
                self._parents.move_to_end(name)
                return True
        # Partial reuse, which the connector advises against: the scan may take a millisecond.
        is_beside = num_beyond > 0 and num_full <= len(chain.hashes)
        return is_beside and chain.parent_of(num_full) in self._parents.values()

    def are_gone_behind(self, chain: BlockHashChain, num_tokens: int) -> None:
        """The engine found no more than `num_tokens` tokens of this prompt, and looked for more.

        A tree is searched from its root: what hangs on a block that is not found cannot be found
        either, whatever it holds. The last token of a prompt is never looked for, so a match that
        ends there says nothing: the block may be in the tree, and stays in it as it is.
        """
        size = chain.tokens_per_block
        if not self._parents or num_tokens // size >= (chain.num_tokens - 1) // size:
            return
        for name in islice(chain.hashes, num_tokens // size, None):
            self._parents.pop(name, None)
