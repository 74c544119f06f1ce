"""What is believed of every cache: which leading blocks of a prompt each holder has. Pure.

A hint, never the truth: a wrong entry makes a prediction worse, never an answer. So blocks are
known here by 60 bits of their hash. Two of ten million share them with a chance of 1 in 20,000, and
then a prompt may go to a replica that lacks what it was thought to have; what a replica reuses is
decided by whole hashes. Hashes begin with their tenant's salt, so tenants share no key either.

What it prevents: memory that grows with every prompt, and look-ups that touch every block of it.
"""

import sys
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from actors.routing.block_tables import GENERATION_BLOCKS, BlockTables
from shared_cache.hashing import HASH_BYTES, BlockHash

MAX_LATER = 4096
"""Chains that wait for the next `tidy` at most."""

KEY_BITS = 60
"""Python keeps an integer of so many bits in 32 bytes; one bit more would take 48."""

_KEY_MASK = (1 << KEY_BITS) - 1
_WORDS = HASH_BYTES // 8


def routing_keys(hashes: Sequence[BlockHash], stride: int = 1) -> "array[int]":
    """The keys of every `stride`-th block of a chain (whole hashes, from block 0), in order.

    With a stride, blocks are known in groups: less memory and time, and depths in multiples of it.
    """
    words = array("Q", b"".join(hashes[stride - 1 :: stride]))
    if sys.byteorder == "big":
        words.byteswap()
    return array("Q", [word & _KEY_MASK for word in words[::_WORDS]])


class BlockIndex:
    """Which blocks each holder has: a replica's device, a machine's host memory, a shared tier.

    Bounded by `capacity` blocks and by time: what was not added or looked up for `ttl_s` is
    forgotten before twice that has passed, and so is what was added longest ago when there is no
    room. A holder has no block without those before it in its chain: engines and host tiers keep
    it so. Time is given, not read.
    """

    def __init__(
        self,
        capacity: int = 1 << 20,
        ttl_s: float = 3600.0,
        generation_blocks: int = GENERATION_BLOCKS,
    ) -> None:
        self.capacity = capacity
        self._tables = BlockTables(capacity, generation_blocks)
        self._step_s = ttl_s / self._tables.num_shards
        self._due_s: float | None = None
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._counts: dict[int, int] = {}
        self._retired: list[tuple[int, int]] = []  # (turn from which it may be used again, number)
        self._alive = 0
        self._later: deque[tuple[str, Sequence[int]]] = deque(maxlen=MAX_LATER)

    def __len__(self) -> int:
        """Blocks of which anything is kept."""
        return len(self._tables)

    def __contains__(self, key: int) -> bool:
        """Whether anybody has this block."""
        return bool(self._tables.get(key) & self._alive)

    @property
    def holders(self) -> tuple[str, ...]:
        """The names of all holders."""
        return tuple(self._bits)

    def num_blocks(self, holder: str) -> int:
        """How many blocks the holder is believed to have; 0 for an unknown one."""
        self._count_dropped()
        return self._counts.get(self._bits.get(holder, 0), 0)

    def add_holder(self, holder: str) -> None:
        """Start afresh for one holder, which has nothing."""
        self.remove_holder(holder)
        number = self._free_number()
        self._bits[holder] = bit = 1 << number
        self._names[number] = holder
        self._counts[bit] = 0
        self._alive |= bit

    def remove_holder(self, holder: str) -> None:
        """Forget a holder and everything it has, at once; an unknown one is no error."""
        bit = self._bits.pop(holder, 0)
        if not bit:
            return
        self._count_dropped()
        number = bit.bit_length() - 1
        del self._names[number], self._counts[bit]
        self._alive &= ~bit
        # After two rounds no entry has the bit any more; what is recent may be one round late.
        self._retired.append((self._tables.num_turns + 3 * self._tables.num_shards, number))

    def add(self, holder: str, keys: Sequence[int]) -> None:
        """Believe that `holder` has these blocks; nothing for an unknown holder."""
        bit = self._bits.get(holder)
        if bit is not None:
            self._counts[bit] += self._tables.add(keys, bit, self._alive)

    def book(self, holder: str, keys: Sequence[int], depths: Mapping[str, int]) -> None:
        """`add` for a chain right after `match` has given `depths` for it; much faster.

        What nobody had is known at once. The rest follows at the next `tidy`: blocks that others
        have already, and that what is about to be forgotten is in use.
        """
        bit = self._bits.get(holder)
        if bit is None or not keys:
            return
        known = max(depths.values(), default=0)
        if known and self._tables.is_ageing(keys[known - 1]):
            self._later.append((holder, keys[:known]))
        elif (own := depths.get(holder, 0)) < known:
            self._later.append((holder, keys[own:known]))
        if known < len(keys):
            self._tables.write_new(keys[known:], bit)
            self._counts[bit] += len(keys) - known

    def remove(self, holder: str, keys: Sequence[int]) -> None:
        """Believe no more that `holder` has these blocks; unknown ones are no error."""
        bit = self._bits.get(holder)
        if bit is not None:
            self._counts[bit] -= sum(self._tables.remove(key, bit) for key in keys)

    def match(self, keys: Sequence[int]) -> dict[str, int]:
        """How many leading blocks of a chain each holder has; those that have none are left out.

        Looks only where a holder's blocks end, by halving: a few look-ups for a long prompt. So a
        holder counts as having all blocks before one that was found.
        """
        get, alive = self._tables.get, self._alive
        depths: dict[str, int] = {}
        first = get(keys[0]) & alive if keys else 0
        if not first:
            return depths
        last = len(keys) - 1
        final = get(keys[last]) & first
        parts = [(0, last, first, final)] if final != first else []
        while parts:
            low, high, at_low, at_high = parts.pop()
            if high - low == 1:
                self._note(depths, at_low ^ at_high, high)
                continue
            middle = (low + high) // 2
            at_middle = get(keys[middle]) & at_low | at_high
            if at_middle != at_low:
                parts.append((low, middle, at_low, at_middle))
            if at_middle != at_high:
                parts.append((middle, high, at_middle, at_high))
        self._note(depths, final, last + 1)
        return depths

    def tidy(self, now_s: float, max_blocks: int = 4096) -> bool:
        """Forget what is too old and make the next bookings fast, while nobody waits.

        False when there is more to do than `max_blocks`.
        """
        if self._due_s is None:
            self._due_s = now_s + self._step_s
        num_due = int((now_s - self._due_s) // self._step_s) + 1
        if num_due > 0:
            self._due_s += num_due * self._step_s
            for _ in range(min(num_due, 2 * self._tables.num_shards)):
                self._tables.turn()
        while self._later and max_blocks > 0:
            holder, keys = self._later.popleft()
            self.add(holder, keys)
            max_blocks -= len(keys)
        return self._tables.tidy(max(0, max_blocks), self._alive) and not self._later

    def keys_of(self, holder: str) -> Iterator[int]:
        """All blocks that the holder is believed to have; slow."""
        bit = self._bits.get(holder, 0)
        return (key for key, held in self._tables.items() if held & bit)

    def _note(self, depths: dict[str, int], held: int, depth: int) -> None:
        names = self._names
        while held:
            bit = held & -held
            depths[names[bit.bit_length() - 1]] = depth
            held ^= bit

    def _count_dropped(self) -> None:
        for held, num_blocks in self._tables.take_dropped().items():
            left = held & self._alive
            while left:
                bit = left & -left
                self._counts[bit] -= num_blocks
                left ^= bit

    def _free_number(self) -> int:
        self._count_dropped()  # before a number may come to mean somebody else
        if self._retired and self._retired[0][0] <= self._tables.num_turns:
            return self._retired.pop(0)[1]
        return len(self._names) + len(self._retired)
