"""What the connector's scheduler side tells its worker side: one turn's copies.

It is broadcast to all ranks in every turn, so it is packed, and holds nothing that a rank could
look up itself. Pure.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from shared_cache.hashing import HASH_BYTES, BlockHash


@dataclass(frozen=True, slots=True)
class SaveRun:
    """Consecutive blocks of one request to copy out of the engine's pool, packed for the wire.

    `first` is the place of the first one in the request; `tenant` is who pays for them.
    """

    parent: BlockHash
    packed_hashes: bytes
    packed_blocks: bytes
    tenant: bytes = b""
    first: int = 0

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The blocks' hashes, first block first."""
        packed = self.packed_hashes
        return tuple(
            BlockHash(packed[start : start + HASH_BYTES])
            for start in range(0, len(packed), HASH_BYTES)
        )

    @property
    def device_blocks(self) -> Sequence[int]:
        """The pool's block ids, in the order of `hashes`."""
        return _unpack(self.packed_blocks)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What the workers are to copy in one turn. Picklable and small: it is broadcast every turn.

    `early_saves` are of requests that have ended: copied before the loads and the forward pass,
    which may write to those blocks. `saves` are copied after the pass that completes them.
    """

    packed_loads: bytes = b""
    saves: tuple[SaveRun, ...] = ()
    early_saves: tuple[SaveRun, ...] = ()

    @property
    def loads(self) -> Sequence[tuple[int, int]]:
        """Pairs (host slot, device block) to copy before the forward pass."""
        numbers = _unpack(self.packed_loads)
        return list(zip(numbers[::2], numbers[1::2], strict=True))


def _unpack(packed: bytes) -> Sequence[int]:
    numbers = array("I")
    numbers.frombytes(packed)
    return numbers
