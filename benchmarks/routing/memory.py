"""The caches of modelled replicas, block by block: what is pinned, and what is used least."""

from collections import OrderedDict
from collections.abc import Container, Sequence

Blocks = Sequence[int]
"""The full blocks of a prompt, first block first; a number names a block and all before it."""


def depth(held: Container[int], blocks: Blocks) -> int:
    """How many leading blocks are held."""
    count = 0
    for block in blocks:
        if block not in held:
            break
        count += 1
    return count


class LruTier:
    """Blocks of host memory or of the store; the least recently used one goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def depth(self, blocks: Blocks) -> int:
        """How many leading blocks are here."""
        return depth(self._held, blocks)

    def use(self, blocks: Blocks) -> tuple[list[int], list[int]]:
        """Put a whole prompt in, its first block last: blocks that were new, blocks that went."""
        held = self._held
        new = []
        for block in reversed(blocks):
            if block in held:
                held.move_to_end(block)
            elif self._capacity:
                held[block] = None
                new.append(block)
        gone = []
        while len(held) > self._capacity:
            gone.append(held.popitem(last=False)[0])
        return new, gone

    def blocks(self) -> list[int]:
        """All that is here."""
        return list(self._held)


class DeviceMemory:
    """KV memory of one engine: blocks of running requests are pinned, the rest is a cache."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_private = 0
        self.pins: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_pinned(self) -> int:
        """Blocks that running requests need."""
        return len(self.pins) + self.num_private

    def __contains__(self, block: int) -> bool:
        return block in self.pins or block in self._cached

    def depth(self, blocks: Blocks) -> int:
        """How many leading blocks are here."""
        return depth(self, blocks)

    def touch(self, blocks: Blocks) -> None:
        """These will be needed soon."""
        for block in reversed(blocks):
            if block in self._cached:
                self._cached.move_to_end(block)

    def can_pin(self, blocks: Blocks, num_private: int) -> bool:
        """Whether a prompt and its private blocks fit beside what runs."""
        if self.num_pinned + len(blocks) + num_private <= self.capacity:
            return True
        new = sum(block not in self.pins for block in blocks)
        return self.num_pinned + new + num_private <= self.capacity

    def pin(self, blocks: Blocks, num_private: int) -> list[int]:
        """Pin a prompt that fits; the blocks that went for it."""
        pins, cached = self.pins, self._cached
        for block in blocks:
            pins[block] = pins.get(block, 0) + 1
            cached.pop(block, 0)
        self.num_private += num_private
        gone = []
        room = self.capacity - self.num_pinned
        while len(cached) > room:
            gone.append(cached.popitem(last=False)[0])
        return gone

    def unpin(self, blocks: Blocks, num_private: int) -> None:
        """The request has ended; its prompt stays cached, its first block longest."""
        pins, cached = self.pins, self._cached
        for block in reversed(blocks):
            count = pins[block] - 1
            if count:
                pins[block] = count
            else:
                del pins[block]
                cached[block] = None
        self.num_private -= num_private

    def blocks(self) -> list[int]:
        """All that is here."""
        return [*self.pins, *self._cached]
