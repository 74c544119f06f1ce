"""Which replica gets a prompt: policies and the prefix index they read.

Pure, so that a routing decision can be replayed from a list of events. It prevents two failures:
sending a prompt where its prefix is but where everybody else is too, and spreading requests that
share a prefix over replicas that then all compute it. Both ends are weighed in one unit, tokens of
predicted work.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.cache_changes import CacheChanges
from shared_cache.hashing import BlockHash


@dataclass(frozen=True, slots=True)
class PromptView:
    """What is known of one prompt: its length, and how much of it lies in the shared tier."""

    num_tokens: int
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What is known of one replica at the moment of a decision.

    `pending_tokens` is booked work that has not brought its first token yet, `known_tokens` the
    leading tokens of the prompt that this replica holds on its device or in host memory.
    """

    replica_id: str
    pending_tokens: int = 0
    num_outstanding: int = 0
    known_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkModel:
    """Predicted work, in tokens of prefill.

    `fetch_cost` is what one token from the shared tier costs; `outstanding_cost` what one running
    request costs a new one, because turns are shared and predictions are in doubt.
    """

    fetch_cost: float = 0.1
    outstanding_cost: float = 32.0

    def prefill(self, prompt: PromptView, known_tokens: int) -> int:
        """Work until the first token on a replica that holds `known_tokens`; at least 1."""
        fetched = max(0, prompt.shared_tokens - known_tokens)
        computed = prompt.num_tokens - known_tokens - fetched
        return max(1, computed + math.ceil(self.fetch_cost * fetched))

    def cost(self, prompt: PromptView, replica: ReplicaView) -> float:
        """What a prompt has to wait for on this replica."""
        return (
            replica.pending_tokens
            + self.outstanding_cost * replica.num_outstanding
            + self.prefill(prompt, replica.known_tokens)
        )


class Policy(Protocol):
    """Chooses one of at least one candidates; mutates at most its own turn counter."""

    def choose(self, prompt: PromptView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """The replica that gets the prompt."""


class PrefixPolicy:
    """The longest known prefix, corrected by load: the least predicted work wins."""

    def __init__(self, work: WorkModel, rng: random.Random) -> None:
        self._work = work
        self._rng = rng

    def choose(self, prompt: PromptView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """The smallest cost; then the fewest outstanding; then at random."""
        ranks = [(self._work.cost(prompt, one), one.num_outstanding) for one in candidates]
        return _random_best(ranks, candidates, self._rng)


class LeastOutstandingPolicy:
    """The replica with the fewest requests, whatever is cached where."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, prompt: PromptView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """The fewest outstanding; then at random."""
        return _random_best([(one.num_outstanding,) for one in candidates], candidates, self._rng)


class RandomPolicy:
    """Any replica, evenly."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, prompt: PromptView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """Any of them."""
        return self._rng.choice(candidates)


class RoundRobinPolicy:
    """Each replica in its turn, by name; one that joins or leaves does not restart the round."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, prompt: PromptView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """The next name after the one chosen last, else the first."""
        ordered = sorted(candidates, key=lambda one: one.replica_id)
        chosen = next((one for one in ordered if one.replica_id > self._last), ordered[0])
        self._last = chosen.replica_id
        return chosen


def _random_best(
    ranks: Sequence[tuple[float, ...]], candidates: Sequence[ReplicaView], rng: random.Random
) -> ReplicaView:
    best = min(ranks)
    return rng.choice([one for rank, one in zip(ranks, candidates, strict=True) if rank == best])


_POLICIES: dict[str, Callable[[WorkModel, random.Random], Policy]] = {
    "prefix": PrefixPolicy,
    "least_outstanding": lambda _, rng: LeastOutstandingPolicy(rng),
    "random": lambda _, rng: RandomPolicy(rng),
    "round_robin": lambda _, __: RoundRobinPolicy(),
}
POLICY_NAMES = tuple(_POLICIES)


def make_policy(name: str, work: WorkModel, rng: random.Random) -> Policy:
    """The policy called `name` (one of `POLICY_NAMES`); another name raises `KeyError`."""
    return _POLICIES[name](work, rng)


class PrefixIndex:
    """Which leading blocks each holder is believed to have; a hint, never the truth.

    A holder is a replica or the shared tier. Per holder the least recently used block goes first
    when `capacity` is exceeded. Chains are always added whole and their first block last, and a
    block is forgotten with its descendants only: what is left of a chain is a prefix of it, and
    `depth` may search by halving.
    """

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}

    def add_holder(self, holder: str, capacity: int) -> None:
        """Start afresh for one holder, which can have at most `capacity` blocks."""
        self._holders[holder] = _Holder(capacity)

    def remove_holder(self, holder: str) -> None:
        """Forget a holder and everything it had; an unknown one is no error."""
        self._holders.pop(holder, None)

    def add(self, holder: str, hashes: Sequence[BlockHash]) -> None:
        """Believe that `holder` has this chain, from block 0; for an unknown holder, nothing."""
        known = self._holders.get(holder)
        if known is not None:
            known.add(hashes)

    def forget(self, holder: str, block_hash: BlockHash) -> None:
        """Believe no more that `holder` has this block, or any that follows it in some chain.

        An unknown holder or block is no error.
        """
        known = self._holders.get(holder)
        if known is not None:
            known.forget(block_hash)

    def apply(self, holder: str, changes: CacheChanges) -> None:
        """Believe what a holder tells of itself; for an unknown holder, nothing."""
        known = self._holders.get(holder)
        if known is None:
            return
        if changes.is_cleared:
            known = self._holders[holder] = _Holder(known.capacity)
        for block_hash in changes.removed:
            known.forget(block_hash)
        for chain in changes.stored:
            known.add(chain)

    def depth(self, holder: str, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of `hashes` the holder is believed to have."""
        known = self._holders.get(holder)
        if known is None:
            return 0
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in known.parents:
                low = middle
            else:
                high = middle - 1
        return low

    def num_blocks(self, holder: str) -> int:
        """How many blocks the holder is believed to have."""
        known = self._holders.get(holder)
        return len(known.parents) if known else 0


class _Holder:
    """The tree of one holder's blocks: `parents` of all, least recently used first, and children.

    Tuples, because nearly all blocks have one child, and there may be a million of them.
    """

    __slots__ = ("_children", "capacity", "parents")

    def __init__(self, capacity: int) -> None:
        self.parents: OrderedDict[BlockHash, BlockHash | None] = OrderedDict()
        self._children: dict[BlockHash, tuple[BlockHash, ...]] = {}
        self.capacity = capacity

    def add(self, hashes: Sequence[BlockHash]) -> None:
        for index in range(len(hashes) - 1, -1, -1):
            block_hash = hashes[index]
            if block_hash not in self.parents:
                self._insert(block_hash, hashes[index - 1] if index else None)
            self.parents.move_to_end(block_hash)
        while len(self.parents) > self.capacity:
            self.forget(next(iter(self.parents)))  # it has no descendants: those are older

    def forget(self, block_hash: BlockHash) -> None:
        if block_hash not in self.parents:
            return
        parent = self.parents[block_hash]
        if parent is not None:
            self._remove_child(parent, block_hash)
        doomed = [block_hash]
        while doomed:
            one = doomed.pop()
            del self.parents[one]
            doomed.extend(self._children.pop(one, ()))

    def _insert(self, block_hash: BlockHash, parent: BlockHash | None) -> None:
        self.parents[block_hash] = parent
        if parent is not None:
            self._children[parent] = (*self._children.get(parent, ()), block_hash)

    def _remove_child(self, parent: BlockHash, child: BlockHash) -> None:
        left = tuple(one for one in self._children[parent] if one != child)
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]
