"""Verifying: reading every block of a namespace and saying which objects are bad, and why.

Replicas check what they read, and a damaged object is a miss to them. But they read only what
somebody asks for, and from a store that they may not write to they cannot clear it away: a disk
that rots is noticed only by whoever reads all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shared_cache.errors import BlockFormatError
from shared_cache.media.medium import Medium
from shared_cache.namespace import Namespace
from shared_cache.stores.known_runs import Place
from shared_cache.stores.run_objects import is_object_name, read_blocks, read_head

READ_BYTES = 32 << 20
READ_BLOCKS = 256
"""How much is read and checked at once, at most."""


@dataclass(frozen=True, slots=True)
class CheckedObject:
    """One object after all of it was read; `fault` says what is wrong with it, None: nothing.

    `num_blocks` are those that were found good.
    """

    name: str
    num_bytes: int
    num_blocks: int
    fault: str | None = None


def verify_objects(medium: Medium, namespace: Namespace) -> Iterator[CheckedObject]:
    """Every object in `medium`, the folder of `namespace`, as it turned out; changes nothing.

    Objects that vanish meanwhile are left out. Raises what the medium raises.
    """
    block_bytes = namespace.layout.block_bytes
    num_buffers = min(READ_BLOCKS, max(1, READ_BYTES // block_bytes))
    pool = memoryview(bytearray(num_buffers * block_bytes))
    buffers = [pool[i : i + block_bytes] for i in range(0, pool.nbytes, block_bytes)]
    for item in list(medium.list()):
        if not is_object_name(item.name):
            continue
        try:
            num_blocks, fault = _check(medium, namespace, item.name, buffers)
        except FileNotFoundError:
            continue
        yield CheckedObject(item.name, item.num_bytes, num_blocks, fault)


def _check(
    medium: Medium, namespace: Namespace, name: str, buffers: list[memoryview]
) -> tuple[int, str | None]:
    """How many leading blocks of an object are good, and what is wrong with the next one.

    Looks twice: an object may be replaced while it is read, and a network may cut an answer.
    """
    num_good, fault = _check_once(medium, namespace, name, buffers)
    return _check_once(medium, namespace, name, buffers) if fault else (num_good, fault)


def _check_once(
    medium: Medium, namespace: Namespace, name: str, buffers: list[memoryview]
) -> tuple[int, str | None]:
    try:
        head = read_head(medium, name, namespace)
    except BlockFormatError as error:
        return 0, str(error)
    num_blocks = len(head.hashes)
    for start in range(0, num_blocks, len(buffers)):
        wanted = head.hashes[start : start + len(buffers)]
        num_read = len(read_blocks(medium, Place(name, head, start), wanted, buffers))
        if num_read < len(wanted):
            return start + num_read, f"block {start + num_read} of {num_blocks} is cut or damaged"
    return num_blocks, None
