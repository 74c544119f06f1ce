"""Run objects: the stored form of runs in a medium, by name; reading and checking them.

Failure prevented: believing a name. What lies under a name counts only after its head was checked
against the namespace and the name itself, and each block against its own checksum.
"""

import re
from collections.abc import Sequence

from shared_cache import codec
from shared_cache.codec import RunHead
from shared_cache.errors import BlockFormatError, CorruptBlockError
from shared_cache.hashing import BlockHash
from shared_cache.known_runs import Place
from shared_cache.medium import Medium, Reader
from shared_cache.namespace import Namespace

VERIFY_BYTES = 8 << 20
"""Read before it is verified: few enough to be in the CPU's cache still, enough for one request."""

_OBJECT_NAME = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}\.arrow")


def object_name(first_hash: BlockHash) -> str:
    """The name of the object whose run begins with `first_hash`."""
    digits = first_hash.hex()
    return f"{digits[:2]}/{digits}.arrow"


def is_object_name(name: str) -> bool:
    """Whether `object_name` can have made `name`."""
    return _OBJECT_NAME.fullmatch(name) is not None


def read_head(medium: Medium, name: str, namespace: Namespace) -> RunHead:
    """The checked head of an object; raises `BlockFormatError` or `FileNotFoundError`."""
    try:
        return _read_head_once(medium, name, namespace)
    except BlockFormatError:  # a network's cut answer looks the same: look twice
        return _read_head_once(medium, name, namespace)


def read_blocks(
    medium: Medium, place: Place, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
) -> int:
    """How many leading `hashes`, said to lie at `place`, are in `buffers` now and verified.

    Fewer than asked for when the object is gone, cut short, damaged or another one by now.
    """
    try:
        with medium.open(place.name) as reader:
            return _read_verified(reader, place, hashes, buffers)
    except FileNotFoundError:
        return 0


def _read_head_once(medium: Medium, name: str, namespace: Namespace) -> RunHead:
    with medium.open(name) as reader:
        start = reader.read(0, codec.FIRST_READ_BYTES)
        while (needed := codec.bytes_needed(start)) > len(start):
            more = reader.read(len(start), needed - len(start))
            if not more:
                raise CorruptBlockError(f"cut short after {len(start)} bytes")
            start += more
    head = codec.parse_head(start, namespace)
    if object_name(head.hashes[0]) != name:
        raise CorruptBlockError(f"holds the run that begins with {head.hashes[0].hex()}")
    return head


def _read_verified(
    reader: Reader, place: Place, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
) -> int:
    block_bytes = buffers[0].nbytes
    step = max(1, VERIFY_BYTES // block_bytes)
    for first in range(0, len(hashes), step):
        rows = range(first, min(first + step, len(hashes)))
        start = place.head.payload_offset + (place.row + first) * block_bytes
        num_bytes = reader.fill(start, [buffers[row] for row in rows])
        for row in rows:
            is_complete = num_bytes >= (row - first + 1) * block_bytes
            checksum = place.head.checksums[place.row + row]
            if not is_complete or not codec.verify(buffers[row], hashes[row], checksum):
                return row
    return len(hashes)
