"""A bounded table of many small integers, without pauses: block key -> set of holders. Pure.

One Python dict of ten million blocks stops the process for a second when it grows, and cannot
forget its oldest entries cheaply. So this is many small dicts of two generations each: what is
written goes to the young one, and in turn each drops its old one as a whole. A key takes 30 bytes,
a value none, as equal sets are one object.

What is written in the middle of a decision goes to one small dict first, which a single call in C
can fill, and is moved on by `tidy`, when nobody waits.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import repeat

GENERATION_BLOCKS = 21_800
"""Blocks of one generation of one dict at most: it is dropped within a few milliseconds."""

MAX_RECENT = 1 << 17
"""Blocks that wait to be moved on at most; a chain that is written beyond that does it itself."""

MAX_SHARED_SETS = 1 << 16
"""Sets of holders that are kept once for all blocks that have them."""


class BlockTables:
    """Maps a key (60 bits) to a set of holders, as bits; keys of which nothing is known have 0.

    Keeps `capacity` keys, and forgets those first that were written longest ago.
    """

    def __init__(self, capacity: int, generation_blocks: int = GENERATION_BLOCKS) -> None:
        # The dicts take turns: on average each holds one and a half generations.
        round_blocks = max(1, capacity * 2 // 3)
        self.num_shards = 1
        while self.num_shards * generation_blocks < round_blocks:
            self.num_shards *= 2
        self.num_turns = 0
        self._turn_blocks = max(1, round_blocks // self.num_shards)
        self._room = self._turn_blocks
        self._last = self.num_shards - 1
        self._recent: dict[int, int] = {}
        self._young: list[dict[int, int]] = [{} for _ in range(self.num_shards)]
        self._old: list[dict[int, int]] = [{} for _ in range(self.num_shards)]
        self._sets: dict[int, int] = {}
        self._dropped: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._recent) + sum(map(len, self._young)) + sum(map(len, self._old))

    def get(self, key: int) -> int:
        """The holders of a key."""
        held = self._recent.get(key)
        if held is None:
            shard = key & self._last
            held = self._young[shard].get(key)
            if held is None:
                held = self._old[shard].get(key, 0)
        return held

    def is_ageing(self, key: int) -> bool:
        """Whether the key was written so long ago that it is forgotten next."""
        shard = key & self._last
        in_old = key in self._old[shard]
        return in_old and key not in self._young[shard] and key not in self._recent

    def write_new(self, keys: Sequence[int], held: int) -> None:
        """Give keys of which nothing is known their first holders; fast."""
        self._recent.update(zip(keys, repeat(held), strict=False))
        if len(self._recent) > MAX_RECENT:
            self.tidy(2 * len(keys))

    def add(self, keys: Sequence[int], held: int, kept: int) -> int:
        """Add holders to keys, the last key first; how many did not have all of them.

        What a key had and is not in `kept` is dropped from it.
        """
        recent, young_of, old_of, last = self._recent, self._young, self._old, self._last
        num_new = num_gained = 0
        for key in reversed(keys):
            table, shard = recent, key & last
            before = table.get(key)
            if before is None:
                table = young_of[shard]
                before = table.get(key)
                if before is None:
                    num_new += 1
                    before = old_of[shard].pop(key, 0)
                    table[key] = before
            if before & held != held:
                num_gained += 1
                table[key] = self._shared(before & kept | held)
            elif before & kept != before:
                table[key] = self._shared(before & kept)
        self._make_room(num_new)
        return num_gained

    def remove(self, key: int, held: int) -> bool:
        """Take holders away from a key; whether it had one of them."""
        shard = key & self._last
        had = False
        for table in (self._recent, self._young[shard], self._old[shard]):
            before = table.get(key, 0)
            if not before & held:
                continue
            had = True
            left = before & ~held
            if left:
                table[key] = self._shared(left)
            else:
                del table[key]
        return had

    def tidy(self, max_blocks: int, kept: int = -1) -> bool:
        """Move what was written to where it stays; False when there is more than `max_blocks`.

        Holders that are not in `kept` are dropped on the way.
        """
        recent, last, num_new = self._recent, self._last, 0
        for _ in range(min(max_blocks, len(recent))):
            key, held = recent.popitem()
            young = self._young[key & last]
            before = young.get(key)
            if before is None:
                num_new += 1
                before = self._old[key & last].pop(key, 0)
            if before & held:
                self._dropped[before & held] += 1
            young[key] = self._shared((before | held) & kept)
        self._make_room(num_new)
        return not recent

    def turn(self) -> None:
        """The next dict in turn forgets what was not written since it did so last."""
        shard = self.num_turns & self._last
        self.num_turns += 1
        self._dropped.update(self._old[shard].values())
        self._old[shard], self._young[shard] = self._young[shard], {}

    def take_dropped(self) -> Counter[int]:
        """The holders that were forgotten since the last call, with how often."""
        dropped, self._dropped = self._dropped, Counter()
        return dropped

    def items(self) -> Iterator[tuple[int, int]]:
        """All keys with their holders; slow."""
        for table in (self._recent, *self._young, *self._old):
            yield from table.items()

    def _shared(self, held: int) -> int:
        return self._sets.setdefault(held, held)

    def _make_room(self, num_new: int) -> None:
        self._room -= num_new
        while self._room <= 0:
            self._room += self._turn_blocks
            self.turn()
        if len(self._sets) > MAX_SHARED_SETS:
            self._sets.clear()
