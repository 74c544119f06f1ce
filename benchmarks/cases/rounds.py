"""Fair comparisons: all methods take turns on the same bytes, and only ratios of medians count.

A shared machine changes its speed by a factor of two within a minute. So no method runs alone for
long, none always comes first, and what was read is compared with what was written, outside the
clock.
"""

import gc
import hashlib
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from benchmarks.rivals.workload import Workload, aligned_blocks
from shared_cache.checksum import block_checksum
from shared_cache.hashing import BlockHash

TURN_BLOCKS = 16
"""Blocks that one turn of an engine completes: 512 tokens."""

BLOCK_SIZES = {"720KiB": 720 << 10, "1.25MiB": 1280 << 10, "4MiB": 4 << 20}
"""Blocks of 32 tokens in bfloat16: SmolLM2-135M, Llama-70B of one of eight ranks, Llama-3.1-8B."""


def new_names(label: str, num_blocks: int) -> tuple[BlockHash, ...]:
    """Hashes that no other label has."""
    root = hashlib.sha256(label.encode())
    names = []
    for index in range(num_blocks):
        digest = root.copy()
        digest.update(index.to_bytes(4, "little"))
        names.append(BlockHash(digest.digest()))
    return tuple(names)


class Payload(Workload):
    """The blocks to store, as runs and buffers; a rival's process has the same bytes."""

    seed = 7

    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        super().__init__(block_bytes, num_blocks, self.seed)

    @property
    def num_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    def payloads(self, blocks: Sequence[int]) -> tuple[memoryview, ...]:
        return tuple(memoryview(self.source[block]).toreadonly() for block in blocks)

    def targets(self, blocks: Sequence[int]) -> tuple[memoryview, ...]:
        """Where these blocks belong in the pool."""
        return tuple(memoryview(self.pool[self.slots[block]]) for block in blocks)

    def checksums(self, names: Sequence[BlockHash]) -> tuple[int, ...]:
        return tuple(
            block_checksum(name, memoryview(row))
            for name, row in zip(names, self.source, strict=True)
        )


class Method(ABC):
    """One way to keep blocks. Both calls give the seconds they took; all blocks are moved.

    `payload` is None for a rival that checks the bytes itself.
    """

    def __init__(self, name: str, payload: Payload | None) -> None:
        self.name = name
        self.payload = payload

    def before_put(self, round_number: int) -> None:  # noqa: B027
        """Not timed: forget the last round's blocks, make new names."""

    @abstractmethod
    def put(self) -> float:
        """Store all blocks."""

    def before_get(self) -> None:  # noqa: B027
        """Not timed."""

    @abstractmethod
    def get(self) -> float:
        """Bring all blocks into the pool."""


@dataclass
class Times:
    """Seconds of each round."""

    put_s: list[float] = field(default_factory=list)
    get_s: list[float] = field(default_factory=list)


class Comparison:
    """What several methods took for the same bytes."""

    def __init__(self, num_bytes: int, times: dict[str, Times]) -> None:
        self._num_bytes = num_bytes
        self._times = times

    def put_ratio(self, ours: str, other: str) -> float | None:
        """How many times faster `ours` puts; None where the other was not measured."""
        if other not in self._times:
            return None
        return _median(self._times[other].put_s) / _median(self._times[ours].put_s)

    def get_ratio(self, ours: str, other: str) -> float | None:
        """How many times faster `ours` gets; None where the other was not measured."""
        if other not in self._times:
            return None
        return _median(self._times[other].get_s) / _median(self._times[ours].get_s)

    def gb_per_s(self) -> dict[str, dict[str, float]]:
        """Of each method, for those who want absolute figures: median and range of the rounds."""
        return {
            name: {
                "put": self._rate(_median(times.put_s)),
                "put_min": self._rate(max(times.put_s)),
                "put_max": self._rate(min(times.put_s)),
                "get": self._rate(_median(times.get_s)),
                "get_min": self._rate(max(times.get_s)),
                "get_max": self._rate(min(times.get_s)),
            }
            for name, times in self._times.items()
        }

    def _rate(self, seconds: float) -> float:
        return self._num_bytes / seconds / 1e9


def compare(
    methods: Sequence[Method],
    num_bytes: int,
    num_rounds: int,
    prepare: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run all methods in turn: one round that does not count, then `num_rounds` that do.

    The order is rotated from round to round and reversed in every other one. `prepare` is called
    before each put.
    """
    times = {method.name: Times() for method in methods}
    for round_number in range(num_rounds + 1):
        turn = round_number // 2 % len(methods)
        order = [*methods[turn:], *methods[:turn]]
        for method in reversed(order) if round_number % 2 else order:
            method.before_put(round_number)
            prepare()
            put_s, get_s = _one_round(method)
            if round_number:
                times[method.name].put_s.append(put_s)
                times[method.name].get_s.append(get_s)
    return Comparison(num_bytes, times)


def _one_round(method: Method) -> tuple[float, float]:
    with _no_collection():
        put_s = method.put()
    method.before_get()
    if method.payload is not None:
        method.payload.clear_pool()
    with _no_collection():
        get_s = method.get()
    if method.payload is not None:
        method.payload.check_pool()
    return put_s, get_s


def _timed(work: Callable[[], None]) -> float:
    """Seconds that a call took."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


class Moves(Method):
    """A way of ours: `_put` and `_get` are timed here."""

    payload: Payload

    def put(self) -> float:
        return _timed(self._put)

    def get(self) -> float:
        return _timed(self._get)

    @abstractmethod
    def _put(self) -> None: ...

    @abstractmethod
    def _get(self) -> None: ...


class Memcpy(Moves):
    """The limit: each block copied by one memcpy, out of the source and into the pool."""

    def __init__(self, payload: Payload) -> None:
        super().__init__("memcpy", payload)
        self._kept = aligned_blocks(payload.num_blocks, payload.block_bytes)
        self._kept.fill(0)

    def _put(self) -> None:
        for kept, block in zip(self._kept, self.payload.source, strict=True):
            np.copyto(kept, block)

    def _get(self) -> None:
        for kept, slot in zip(self._kept, self.payload.slots, strict=True):
            np.copyto(self.payload.pool[slot], kept)
