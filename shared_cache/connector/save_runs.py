"""Runs of blocks that an engine has completed, packed for the wire. Pure."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shared_cache.hashing import HASH_BYTES, BlockHash

_BLOCK_ID_BYTES = array("I").itemsize

RUN_ROOM = 2
"""What a run takes in a plan besides its blocks, in blocks: its parent, and what it is."""


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
    def num_blocks(self) -> int:
        """How many blocks these are."""
        return len(self.packed_hashes) // HASH_BYTES

    @property
    def room(self) -> int:
        """What this run takes in a plan, in blocks."""
        return self.num_blocks + RUN_ROOM

    def leading(self, num_blocks: int) -> "SaveRun":
        """The first `num_blocks` of these, or all of them if they are no more."""
        if num_blocks >= self.num_blocks:
            return self
        return replace(
            self,
            packed_hashes=self.packed_hashes[: num_blocks * HASH_BYTES],
            packed_blocks=self.packed_blocks[: num_blocks * _BLOCK_ID_BYTES],
        )

    def behind(self, num_blocks: int) -> "SaveRun":
        """All but the first `num_blocks` of these, which must be fewer than all."""
        cut = num_blocks * HASH_BYTES
        return replace(
            self,
            parent=BlockHash(self.packed_hashes[cut - HASH_BYTES : cut]) if cut else self.parent,
            packed_hashes=self.packed_hashes[cut:],
            packed_blocks=self.packed_blocks[num_blocks * _BLOCK_ID_BYTES :],
            first=self.first + num_blocks,
        )

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
        numbers = array("I")
        numbers.frombytes(self.packed_blocks)
        return numbers
