"""The checksum of a block: computed once, when it enters a tier, and checked whenever it moves on.

xxh3_64 runs at the speed of memory. It is seeded from the block's name, so good bytes under a wrong
name fail too.
"""

from collections.abc import Iterable

import xxhash

from shared_cache.hashing import BlockHash


def block_checksum(block_hash: BlockHash, payload: memoryview) -> int:
    """xxh3_64 over a contiguous payload, seeded from the name it is kept under.

    Other threads run meanwhile. `xxh3_64_intdigest`, which looks shorter, keeps the interpreter's
    lock before xxhash 4: an engine would wait for every block that is saved beside it.
    """
    return xxhash.xxh3_64(payload, seed=checksum_seed(block_hash)).intdigest()


def checksum_of_pieces(block_hash: BlockHash, pieces: Iterable[memoryview]) -> int:
    """`block_checksum` of a payload that comes in pieces; each is read when it is handed over."""
    digest = xxhash.xxh3_64(seed=checksum_seed(block_hash))
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def checksum_seed(block_hash: BlockHash) -> int:
    """The seed for the checksum of the block of this name."""
    return int.from_bytes(block_hash[:8], "little")
