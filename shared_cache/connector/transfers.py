"""What the connector's scheduler side tells its worker side: one turn's copies.

It is broadcast to all ranks in every turn, so it is packed for that, and holds nothing that a rank
could look up itself. It touches no bytes of blocks.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_cache.connector.packing import Numbers, pack, unpack
from shared_cache.connector.save_runs import SaveRun as SaveRun
from shared_cache.hashing import HASH_BYTES
from shared_cache.host.interface import Place

MAX_PLAN_BYTES = 62 * 1024
"""A plan is no larger, but for `MIN_SAVES`, unless its loads alone are: these cannot wait.

They are not where an arena's free slots lie in runs. Scattered all over, the blocks of a prompt of
128k tokens take some 60 KiB on eight ranks where each rank's lie in 16,384 slots, and more in a
larger arena: such a plan is sent as it is.
"""

MAX_SAVES = 1024
"""Blocks saved in one turn at most, so that no turn is held up by copies for long."""

MIN_SAVES = 16
"""So many blocks may be saved in a turn whose loads fill the plan: else they might wait forever."""

SAVE_BYTES = HASH_BYTES + 4
"""What one saved block takes in a plan: its hash and its device block."""

_SMALL_BYTES = MAX_PLAN_BYTES - MAX_SAVES * SAVE_BYTES - 1024
"""Loads that take no more as they are leave room for all saves; packed they take hardly more."""

_SORTED_FROM_BYTES = 16 * 1024
"""Loads that take more are tried in another order, too."""


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks for one request's prefix: `device_blocks[i]` gets block i of every place.

    Each rank's shards lie at a place of their own, which may hold more blocks than are loaded.
    """

    places: Sequence[Place]
    device_blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank copies: the block in `place.slots[i]` goes to `device_blocks[i]`."""

    place: Place
    device_blocks: Sequence[int]


class PackedLoads:
    """All loads whose blocks lie in the same memories, one for each rank; packed when it is sent.

    An engine of one process sends nothing, and packing would take its step some tenths of a
    millisecond.
    """

    __slots__ = ("_columns", "_packed", "memories")

    def __init__(self, memories: tuple[bytes, ...], columns: Sequence[Numbers]) -> None:
        """`columns` are the device blocks, then each rank's slots, `[num_blocks]` of uint32."""
        self.memories = memories
        self._columns = columns
        self._packed: bytes | None = None

    @property
    def num_blocks(self) -> int:
        """How many blocks each rank loads."""
        return len(self._columns[0])

    @property
    def num_bytes(self) -> int:
        """What it would take as it is."""
        return sum(column.nbytes for column in self._columns)

    @property
    def packed(self) -> bytes:
        """All columns in few bytes; see `packing`."""
        if self._packed is None:
            self._packed = _packed(self._columns)
        return self._packed

    def of_rank(self, rank: int) -> RankLoad:
        """What `rank` has to copy."""
        slots = array("I", self._columns[1 + rank].tobytes())
        return RankLoad(Place(self.memories[rank], slots), self._columns[0].tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedLoads):
            return NotImplemented
        return (self.memories, self.packed) == (other.memories, other.packed)

    def __hash__(self) -> int:
        return hash((self.memories, self.num_blocks))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self.memories, self.num_blocks, self.packed)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What the workers are to copy in one turn. Picklable and small: it is broadcast every turn.

    `early_saves` are of requests that have ended: copied before the loads and the forward pass,
    which may write to those blocks. `saves` are copied after the pass that completes them.
    `loads_ahead` are those of requests, by id, that are not computed before they are done.
    Of the ended requests `let_go` nothing is left to save once this plan is carried out. A
    `refusal` says why this turn must not run at all; there is nothing to copy then.
    """

    packed_loads: tuple[PackedLoads, ...] = ()
    saves: tuple[SaveRun, ...] = ()
    early_saves: tuple[SaveRun, ...] = ()
    refusal: str = ""
    loads_ahead: tuple[tuple[int, tuple[PackedLoads, ...]], ...] = ()
    let_go: tuple[int, ...] = ()

    def loads_of(self, rank: int) -> Sequence[RankLoad]:
        """What `rank` copies to the device before the forward pass, in any order."""
        return [loads.of_rank(rank) for loads in self.packed_loads]


def pack_loads(loads: Sequence[Load]) -> tuple[PackedLoads, ...]:
    """These loads for the wire: one part, but for those moments in which an arena is replaced."""
    parts: dict[tuple[bytes, ...], list[Load]] = {}
    for load in loads:
        parts.setdefault(tuple(place.memory for place in load.places), []).append(load)
    return tuple(PackedLoads(memories, _columns(part)) for memories, part in parts.items())


def num_saves_beside(loads: Sequence[PackedLoads]) -> int:
    """How many blocks may be saved in a turn that has these loads, early ones too.

    Each run takes some more than its blocks: `SaveRun.room`.
    """
    if sum(part.num_bytes for part in loads) <= _SMALL_BYTES:
        return MAX_SAVES
    left_bytes = MAX_PLAN_BYTES - sum(len(part.packed) for part in loads)
    return min(MAX_SAVES, max(MIN_SAVES, left_bytes // SAVE_BYTES))


def _columns(loads: Sequence[Load]) -> list[Numbers]:
    columns = [np.array([block for load in loads for block in load.device_blocks], np.uint32)]
    for rank in range(len(loads[0].places)):
        slots = array("I")
        for load in loads:
            slots += load.places[rank].slots[: len(load.device_blocks)]
        columns.append(np.frombuffer(slots, np.uint32))
    return columns


def _packed(columns: Sequence[Numbers]) -> bytes:
    packed = pack(columns)
    if len(packed) > _SORTED_FROM_BYTES:
        # Blocks may be copied in any order. Where all is scattered, one column at least is cheap.
        order = np.argsort(columns[0])
        packed = min(packed, pack([column[order] for column in columns]), key=len)
    return packed


def _unpacked(memories: tuple[bytes, ...], num_blocks: int, packed: bytes) -> PackedLoads:
    return PackedLoads(memories, unpack(packed, 1 + len(memories), num_blocks))
