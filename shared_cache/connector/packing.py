"""Lists of slot numbers in few bytes: a plan is broadcast to all ranks in every turn.

The plan of a 128k-token prompt names 4,096 device blocks and, on eight ranks, 32,768 slots: 147 kB
as they are. Slots that were taken in a row differ by one from their neighbours, and shards that
were filled together lie alike, so differences compress to almost nothing. Slots of a fragmented
arena do not: they need as many bits as tell one slot from another, and not many more. Pure.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint32]

_NUM_BYTES = 4
_LEVEL = 1
"""Higher ones take several times as long in the engine's step, and gain a hundredth."""

_OWN_STATISTICS_ROWS = 512
"""Columns as long as this are compressed by their own statistics; the tables of shorter ones would
take more than they save."""

_PLAIN, _STEPS, _STEPS_LIKE_BEFORE = range(3)


def pack(columns: Sequence[Numbers]) -> bytes:
    """These columns, all of one length, as few bytes; see `unpack`.

    A column is kept as it is, or as the steps between neighbours, or as how these differ from those
    of the column before.
    """
    kinds = bytearray()
    coded = []
    before: Numbers | None = None
    for column in columns:
        steps = np.diff(column, prepend=np.uint32(0))
        ways = [column, _folded(steps)]
        if before is not None:
            ways.append(_folded(steps - before))
        sizes = [_estimated_bits(way) for way in ways]
        kinds.append(sizes.index(min(sizes)))
        coded.append(ways[kinds[-1]])
        before = steps
    return bytes(kinds) + _squeezed(coded)


def unpack(packed: bytes, num_columns: int, num_rows: int) -> list[Numbers]:
    """The columns that were given to `pack`."""
    raw = zlib.decompress(packed[num_columns:], wbits=-zlib.MAX_WBITS)
    planes = np.frombuffer(raw, np.uint8).reshape(_NUM_BYTES, num_columns, num_rows)
    table = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view("<u4")[:, :, 0]
    columns: list[Numbers] = []
    before = np.zeros(num_rows, np.uint32)
    for kind, coded in zip(packed[:num_columns], table, strict=True):
        values = coded.astype(np.uint32)
        if kind == _PLAIN:
            before = np.diff(values, prepend=np.uint32(0))
        else:
            values = _unfolded(values)
            before = values + before if kind == _STEPS_LIKE_BEFORE else values
            values = np.cumsum(before, dtype=np.uint32)
        columns.append(values)
    return columns


def _folded(steps: Numbers) -> Numbers:
    """Small steps, up or down, as small numbers: 0, -1, 1, -2, 2, ..."""
    signs: Numbers = (steps.view(np.int32) >> 31).view(np.uint32)
    folded: Numbers = (steps << np.uint32(1)) ^ signs
    return folded


def _unfolded(numbers: Numbers) -> Numbers:
    steps: Numbers = (numbers >> np.uint32(1)) ^ np.negative(numbers & np.uint32(1))
    return steps


def _planes(numbers: Numbers) -> NDArray[np.uint8]:
    """The lowest bytes of all numbers, then the next ones, which have fewer distinct values."""
    planes: NDArray[np.uint8] = numbers.astype("<u4").view(np.uint8).reshape(-1, _NUM_BYTES).T
    return planes


def _estimated_bits(numbers: Numbers) -> float:
    """What the numbers take if each byte takes what its frequency in its plane tells."""
    bits = 0.0
    for plane in _planes(numbers):
        counts = np.bincount(plane)
        counts = counts[counts > 0]
        bits -= float(np.sum(counts * np.log2(counts / len(plane))))
    return bits


def _squeezed(columns: Sequence[Numbers]) -> bytes:
    # Matches other than runs do not occur by reason, and those that occur by chance cost bits.
    squeezing = zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS, strategy=zlib.Z_RLE)
    squeezed = []
    planes = [_planes(column) for column in columns]
    for place in range(_NUM_BYTES):
        for plane in planes:
            squeezed.append(squeezing.compress(plane[place].tobytes()))
            if len(plane[place]) >= _OWN_STATISTICS_ROWS:
                squeezed.append(squeezing.flush(zlib.Z_SYNC_FLUSH))
    return b"".join(squeezed) + squeezing.flush()
