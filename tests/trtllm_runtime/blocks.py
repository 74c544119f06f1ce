"""Who has which block of the pool: allocation, the tree of reusable blocks, eviction, pins.

One answer for all ranks, as their managers decide alike. A block that nobody holds stays reusable
until another request needs its place; what nobody holds is given away leaf first, longest unused
first. What hangs on a block that goes cannot be found any more, whoever holds it. Which one goes is
no part of the contract, so it can be the newest too: then whoever copies late out of a freed block
finds another request's bytes. `poisoned` are blocks that hold anything but the
KV they are named by: of tokens that nobody computed, or that were computed behind such.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tests.trtllm_runtime.oracle import LAYOUT, State
from tests.trtllm_runtime.requests import Request

SIZE = LAYOUT.tokens_per_block


class OutOfBlocksError(AssertionError):
    """The scheduler let a request in for which there is no room: a mistake of the double."""


@dataclass(slots=True)
class _Stored:
    block: int
    parent: State
    num_children: int = 0


@dataclass(frozen=True, slots=True)
class PartialCopy:
    """Bytes of one block that a partial match takes along, on every rank, before any forward."""

    source: int
    target: int


class BlockManager:
    """The blocks of one pool. `partial_reuse` as in `enable_partial_reuse`."""

    def __init__(
        self, num_blocks: int, *, partial_reuse: bool = False, newest_first: bool = False
    ) -> None:
        self.num_blocks = num_blocks
        self._newest_first = newest_first
        self._partial_reuse = partial_reuse
        self._refs: Counter[int] = Counter()
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._stored: dict[State, _Stored] = {}
        self._name_of: dict[int, State] = {}
        self._tokens_of: dict[State, tuple[State, ...]] = {}
        self.poisoned: set[int] = set()
        self.num_evicted = 0

    @property
    def num_free(self) -> int:
        """Blocks that a new request may get, reusable ones included."""
        return len(self._free)

    @property
    def num_stored(self) -> int:
        """Blocks in the reuse tree."""
        return len(self._stored)

    def add_sequence(self, request: Request) -> list[PartialCopy]:
        """Find what the device has of the prompt, and allocate blocks for all of it.

        Sets the request's blocks and `num_device_tokens`. The last token of a prompt is never
        found: it has to be computed.
        """
        blocks: list[int] = []
        copies: list[PartialCopy] = []
        if not request.is_dummy:
            for index in range((request.prompt_len - 1) // SIZE):
                stored = self._stored.get(request.trail.states[(index + 1) * SIZE - 1])
                if stored is None:
                    break
                self._claim(stored.block)
                blocks.append(stored.block)
        request.num_device_tokens = len(blocks) * SIZE
        source, num_tokens = self._partial_match(request, len(blocks))
        is_poisoned = source in self.poisoned
        while len(blocks) * SIZE < request.prompt_len:
            blocks.append(self._new_block(keep=source))
            if source is not None:
                self.poisoned |= {blocks[-1]} if is_poisoned else set()
                copies.append(PartialCopy(source, blocks[-1]))
                request.num_device_tokens += num_tokens
                source = None
            else:
                request.fresh_blocks.append(blocks[-1])
        request.blocks = blocks
        request.num_kv_tokens = request.prompt_len
        return copies

    def add_token(self, request: Request) -> None:
        """Room for one more token."""
        assert request.blocks is not None
        request.num_kv_tokens += 1
        if request.num_kv_tokens > len(request.blocks) * SIZE:
            request.blocks.append(self._new_block())
            request.fresh_blocks.append(request.blocks[-1])

    def store(self, request: Request, num_tokens: int) -> None:
        """Make the full blocks of the first `num_tokens` tokens reusable."""
        if request.is_dummy or request.blocks is None:
            return
        parent = request.trail.root
        for index in range(num_tokens // SIZE):
            name, block = request.trail.states[(index + 1) * SIZE - 1], request.blocks[index]
            if name not in self._stored:
                if block in self._name_of:
                    return  # reused under another name: what follows hangs on that one
                self._stored[name] = _Stored(block, parent)
                if (index + 1) * SIZE > request.num_valid:
                    self.poisoned.add(block)
                self._name_of[block] = name
                self._tokens_of[name] = request.trail.block(index, SIZE)
                if parent in self._stored:
                    self._stored[parent].num_children += 1
            parent = name

    def remove_sequence(self, request: Request, num_tokens: int) -> list[int]:
        """End a request: its blocks of the first `num_tokens` tokens become reusable, all free."""
        self.store(request, num_tokens)
        blocks, request.blocks = request.blocks or [], None
        request.fresh_blocks = []
        self.unpin(list(reversed(blocks)))  # leaves first
        return blocks

    def pin(self, blocks: Sequence[int]) -> None:
        """Hold blocks beyond their request."""
        for block in blocks:
            self._claim(block)

    def unpin(self, blocks: Sequence[int]) -> None:
        """Let go of blocks once."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is let go of twice"
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None

    def evict_all(self) -> None:
        """Forget all reusable blocks that nobody holds."""
        while leaves := [one for one in self._free if one in self._name_of and self._may_go(one)]:
            for block in leaves:
                self._forget(block)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """The books are right, given all blocks that requests and pins hold."""
        refs = Counter(block for blocks in held for block in blocks)
        assert refs == +self._refs, "blocks are held by nobody, or given away while held"
        assert set(self._free) == set(range(self.num_blocks)) - set(refs)
        assert {stored.block for stored in self._stored.values()} == set(self._name_of)

    def _claim(self, block: int) -> None:
        self._refs[block] += 1
        self._free.pop(block, None)

    def _new_block(self, keep: int | None = None) -> int:
        """A block nobody holds, out of the tree; `keep` stays in the tree if any other can go."""
        order = list(reversed(self._free) if self._newest_first else self._free)
        leaves = (one for one in order if self._may_go(one) and one != keep)
        block = next(leaves, next((one for one in order if one != keep), keep))
        if block is None or block not in self._free:
            raise OutOfBlocksError(f"no block is free of {self.num_blocks}")
        self._forget(block)
        self._claim(block)
        self.poisoned.discard(block)
        return block

    def _may_go(self, block: int) -> bool:
        """Whether nothing in the tree hangs on this block."""
        name = self._name_of.get(block)
        return name is None or not self._stored[name].num_children

    def _forget(self, block: int) -> None:
        """Take a block out of the tree, if it is in there, with all that hangs on it."""
        name = self._name_of.pop(block, None)
        if name is None:
            return
        for child in [one.block for one in self._stored.values() if one.parent == name]:
            self._forget(child)
        parent = self._stored.pop(name).parent
        del self._tokens_of[name]
        if parent in self._stored:
            self._stored[parent].num_children -= 1
        self.num_evicted += 1

    def _partial_match(self, request: Request, num_blocks: int) -> tuple[int | None, int]:
        """A stored block that begins with the next tokens, and how many of them it has."""
        if not self._partial_reuse or request.is_dummy:
            return None, 0
        wanted = request.trail.states[num_blocks * SIZE : request.prompt_len - 1][:SIZE]
        best: tuple[int | None, int] = (None, 0)
        for name, states in self._tokens_of.items():
            common = sum(1 for one, other in zip(wanted, states, strict=False) if one == other)
            if common > best[1]:
                best = self._stored[name].block, common
        return best
