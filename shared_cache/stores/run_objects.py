"""Run objects: the stored form of runs in a medium, by name; reading and checking them.

Failure prevented: believing a name. What lies under a name counts only after its head was checked
against the namespace and the name itself, and each block against its own checksum.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice, takewhile
from threading import Event, Lock
from typing import Any

from shared_cache.checksum import checksum_of_pieces, checksum_seed
from shared_cache.errors import BlockFormatError, CorruptBlockError
from shared_cache.hashing import BlockHash
from shared_cache.media.medium import Medium, Reader
from shared_cache.namespace import Namespace
from shared_cache.parallel import MAX_HELPERS, run_all
from shared_cache.readers.memory import is_any_mapped, outside_buffers
from shared_cache.stores import codec
from shared_cache.stores.codec import RunHead
from shared_cache.stores.compression import decompress
from shared_cache.stores.known_runs import Place

STEP_IN_MEMORY_BYTES = 2 << 20
"""Copied from the page cache before it is verified: few enough to be in the CPU's cache then."""

PIECE_IN_MEMORY_BYTES = (1 if (os.cpu_count() or 1) <= 4 else 4) << 20
"""The same, for blocks that are larger. With many cores it is the interpreter's lock, taken between
pieces, that limits: fewer of them were twice as fast on 16 cores."""

MIN_BLOCK_BYTES_OUTSIDE = 256 << 10
"""Smaller blocks are copied several at a time here, and one by one there."""

OBJECTS_AT_ONCE = 8
"""Open for another process at a time, by one read: descriptors are few."""

Part = tuple[Place, Sequence[BlockHash], Sequence[memoryview]]
"""Where blocks are said to lie, which they are, and a buffer for each."""

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
    medium: Medium,
    place: Place,
    hashes: Sequence[BlockHash],
    buffers: Sequence[memoryview],
    *,
    note_use: bool = False,
) -> tuple[int, ...]:
    """The checksums of the leading `hashes`, said to lie at `place`, that are in `buffers` now.

    They are verified. Fewer than asked for when the object is gone, cut short, damaged or another
    one by now. There may be more buffers than hashes. `note_use`: let the medium note the use.
    """
    try:
        with medium.open(place.name) as reader:
            num_good = _read_verified(reader, place, hashes, buffers[: len(hashes)])
            if num_good and note_use:
                reader.note_use()
    except FileNotFoundError:
        return ()
    return place.head.checksums[place.row : place.row + num_good]


def read_outside(
    medium: Medium, parts: Iterable[Part], *, note_use: bool = False
) -> tuple[int, ...]:
    """What a reader process brings of `parts`, all objects at once; as `read_blocks` otherwise.

    Each part is a place, the hashes said to lie there, and as many buffers. Only what lies in the
    page cache, as it is, is read in this way. When this returns, nobody writes to any buffer.
    """
    checksums: list[int] = []
    waiting = iter(parts if is_any_mapped() else ())
    while batch := list(islice(waiting, OBJECTS_AT_ONCE)):
        good = _read_outside(medium, batch, note_use)
        checksums += good
        if len(good) < sum(len(hashes) for _, hashes, _ in batch):
            break
    return tuple(checksums)


def _read_outside(medium: Medium, parts: Sequence[Part], note_use: bool) -> list[int]:
    running: list[tuple[Callable[[], bool], Reader, Place, int]] = []
    with ExitStack() as opened:
        try:
            for place, hashes, buffers in parts:
                reader = opened.enter_context(medium.open(place.name))
                is_done = _begin_outside(reader, place, hashes, buffers)
                if is_done is None:
                    break
                running.append((is_done, reader, place, len(hashes)))
        except OSError:
            pass  # `read_blocks` meets it, too
        finally:
            are_good = [is_done() for is_done, *_ in running]
        checksums: list[int] = []
        for (_, reader, place, num_blocks), is_good in zip(running, are_good, strict=True):
            if not is_good:
                break
            checksums += place.head.checksums[place.row : place.row + num_blocks]
            if note_use:
                reader.note_use()
    return checksums


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
    """How many leading blocks are in `buffers` and verified; several steps are under way at once.

    From a disk or a network only one step is read at a time, in order, while others are verified.
    """
    block_bytes = buffers[0].nbytes
    start, end = place.head.place_of(place.row, len(hashes), block_bytes)
    is_in_memory = reader.is_in_memory(start, end - start)
    step = max(1, (STEP_IN_MEMORY_BYTES if is_in_memory else reader.step_bytes) // block_bytes)
    starts = range(0, len(hashes), step)
    waiting, is_over = iter(starts), Event()
    turn: AbstractContextManager[Any] = nullcontext() if is_in_memory else Lock()

    def read_next() -> tuple[int, int] | None:
        with turn:
            first = None if is_over.is_set() else next(waiting, None)
            if first is None:
                return None
            wanted = hashes[first : first + step]
            here = replace(place, row=place.row + first)
            verify = _fill(reader, here, wanted, buffers[first : first + step], is_in_memory)
        num_good = verify()
        if num_good < len(wanted):
            is_over.set()
        return first, num_good

    def read_on() -> list[tuple[int, int]]:
        return list(iter(read_next, None))

    num_good = 0
    steps = run_all([read_on] * min(len(starts), 1 + MAX_HELPERS))
    for first, num_more in sorted(chain.from_iterable(steps)):
        if num_good < first:
            break
        num_good += num_more
    return num_good


def _begin_outside(
    reader: Reader, place: Place, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
) -> Callable[[], bool] | None:
    """Have a reader process read blocks: see `OutsideBuffers.begin`. None: it cannot."""
    block_bytes = buffers[0].nbytes
    if reader.file is None or place.head.ends or block_bytes < MIN_BLOCK_BYTES_OUTSIDE:
        return None
    start, end = place.head.place_of(place.row, len(hashes), block_bytes)
    if not reader.is_in_memory(start, end - start):
        return None
    outside = outside_buffers(buffers)
    if outside is None:
        return None
    checksums = place.head.checksums[place.row : place.row + len(hashes)]
    rows = [
        (start + index * block_bytes, to, block_bytes, checksum_seed(name), checksum)
        for index, (to, name, checksum) in enumerate(
            zip(outside.places, hashes, checksums, strict=True)
        )
    ]
    return outside.begin(reader.file, rows)


def _fill(
    reader: Reader,
    place: Place,
    hashes: Sequence[BlockHash],
    buffers: Sequence[memoryview],
    is_in_memory: bool,
) -> Callable[[], int]:
    """Read blocks. To be called then: verifies them; how many leading ones are good."""
    if place.head.ends:
        return _fill_compressed(reader, place, hashes, buffers)
    block_bytes = buffers[0].nbytes
    if is_in_memory and block_bytes > max(STEP_IN_MEMORY_BYTES, PIECE_IN_MEMORY_BYTES):
        return partial(_copy_large, reader, place, hashes, buffers)
    start, _ = place.head.place_of(place.row, len(hashes), block_bytes)
    num_complete = reader.fill(start, buffers) // block_bytes
    checksums = place.head.checksums[place.row :]

    def is_good(row: int) -> bool:
        return row < num_complete and codec.verify(buffers[row], hashes[row], checksums[row])

    return lambda: sum(takewhile(bool, map(is_good, range(len(hashes)))))


def _copy_large(
    reader: Reader, place: Place, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
) -> int:
    """Read and verify blocks from memory, each in pieces; how many leading ones are good."""
    block_bytes = buffers[0].nbytes

    def pieces(row: int) -> Iterator[memoryview]:
        start, _ = place.head.place_of(place.row + row, 1, block_bytes)
        for position in range(0, block_bytes, PIECE_IN_MEMORY_BYTES):
            piece = buffers[row].cast("B")[position : position + PIECE_IN_MEMORY_BYTES]
            if reader.fill(start + position, [piece]) < piece.nbytes:
                return
            yield piece

    def is_good(row: int) -> bool:
        expected = place.head.checksums[place.row + row]
        return checksum_of_pieces(hashes[row], pieces(row)) == expected

    return sum(takewhile(bool, map(is_good, range(len(hashes)))))


def _fill_compressed(
    reader: Reader, place: Place, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
) -> Callable[[], int]:
    block_bytes, head = buffers[0].nbytes, place.head
    start, end = head.place_of(place.row, len(hashes), block_bytes)
    stored = memoryview(bytearray(end - start))
    num_filled = reader.fill(start, [stored])

    def is_good(row: int) -> bool:
        first, last = (bound - start for bound in head.place_of(place.row + row, 1, block_bytes))
        return (
            last <= num_filled
            and decompress(stored[first:last], head.element_bytes, buffers[row])
            and codec.verify(buffers[row], hashes[row], head.checksums[place.row + row])
        )

    jobs = [partial(is_good, row) for row in range(len(hashes))]
    return lambda: sum(takewhile(bool, run_all(jobs)))
