"""What `kvcommons cache bench` measures: the limits of this machine, and our own paths beside them.

All routes of one table move the same bytes in the same process, between page-aligned memory that
was touched before, into a random permutation of slots as a paged pool has it. A figure alone says
little on a machine that others use too; the ratio of two from the same table does.
"""

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from shared_cache.errors import KvcommonsError
from shared_cache.hashing import BlockHashChain
from shared_cache.host.interface import HostTier, NewRun
from shared_cache.namespace import Namespace
from shared_cache.stores.store import BlockRun, BlockStore

CALL_BYTES = 8 << 20
"""Most bytes of one system call; larger ones were sometimes several times slower."""

PATIENCE_S = 10.0

GROUP_BLOCKS = 8
"""Blocks that an engine saves or loads in one turn."""


def nothing() -> None:
    """No preparation."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way of the bytes: `prepare` runs outside of the clock, `move` inside.

    `limit` names the route that this one cannot be faster than; None for a limit itself.
    `fills_pool` tells that the bytes are in the slots afterwards.
    """

    name: str
    limit: str | None
    move: Callable[[], None]
    prepare: Callable[[], None] = nothing
    fills_pool: bool = False


class Blocks:
    """The bytes of one table: a source, and a pool of slots that they are moved to.

    Every put stores them under new names (`rename`), so that no store may say it has them already.
    """

    def __init__(self, namespace: Namespace, num_blocks: int) -> None:
        self.namespace = namespace
        self.num_blocks = num_blocks
        self.block_bytes = namespace.layout.block_bytes
        self.num_bytes = num_blocks * self.block_bytes
        source, pool = (_map(self.num_bytes) for _ in range(2))
        for piece in _cut(source, CALL_BYTES):
            piece[:] = random.randbytes(piece.nbytes)
        pool[:] = bytes(pool.nbytes)
        self.source = _cut(source, self.block_bytes)
        order = random.sample(range(num_blocks), num_blocks)
        slots = _cut(pool, self.block_bytes)
        self.slots = [slots[index] for index in order]
        self._num_names = 0
        self.rename()

    def rename(self) -> None:
        """Give the blocks new names."""
        self._num_names += 1
        size = self.namespace.layout.tokens_per_block
        tokens = [self._num_names] * (self.num_blocks * size)
        self.chain = BlockHashChain(size, tokens=tokens)

    def check_pool(self, name: str) -> None:
        """Raise `KvcommonsError` unless all bytes have arrived, then spoil them for the next."""
        for slot, block in zip(self.slots, self.source, strict=True):
            if slot != block:
                raise KvcommonsError(f"{name}: the bytes that came back are not those that went")
            slot[:8] = bytes(8)


def memory_routes(blocks: Blocks, host: HostTier) -> list[Route]:
    """memcpy, and the host tier through its index, leases and checksums."""

    def copy() -> None:
        for slot, block in zip(blocks.slots, blocks.source, strict=True):
            slot[:] = block

    while not host.stats().evicted_blocks:  # touch all of its memory first
        blocks.rename()
        _put(blocks, host)
    return [
        Route("memcpy", None, copy, fills_pool=True),
        Route("host put", "memcpy", partial(_put, blocks, host), prepare=blocks.rename),
        Route("host get", "memcpy", partial(_get, blocks, host), fills_pool=True),
    ]


def _put(blocks: Blocks, host: HostTier) -> None:
    """Save all blocks to the host tier, some in each turn as an engine does."""
    hashes, first = tuple(blocks.chain.hashes), 0
    give_up_s = time.perf_counter() + PATIENCE_S
    while first < len(hashes):
        group = hashes[first : first + GROUP_BLOCKS]
        slots = host.reserve(len(group))
        for slot, block in zip(slots, blocks.source[first:], strict=False):
            host.buffer(slot)[:] = block
        if slots:
            run = NewRun(blocks.chain.parent_of(first), group[: len(slots)], is_stored=True)
            host.release(host.commit(slots, run))
            first += len(slots)
        elif time.perf_counter() > give_up_s:
            raise KvcommonsError("host put: the arena gives no slots; its owner must have died")
        else:  # an engine would drop the save; slots are reserved ahead in the background
            time.sleep(0)


def _get(blocks: Blocks, host: HostTier) -> None:
    lease = host.lease(blocks.chain.hashes)
    if len(lease.slots) < blocks.num_blocks:
        raise KvcommonsError("host get: blocks are missing; the arena's owner must have died")
    for slot, place in zip(lease.slots, blocks.slots, strict=True):
        place[:] = host.buffer(slot)
    host.release(lease)


def store_routes(
    blocks: Blocks, store: BlockStore, recycling: BlockStore, folder: str | None
) -> list[Route]:
    """The store's own put and get; `folder`, where it is local, for reads that begin cold.

    `recycling` is the same store as one that is at its budget: it overwrites what it deleted.
    """
    is_local = folder is not None

    def empty(through: BlockStore) -> None:
        for entry in list(through.entries()):
            through.delete(entry.name)
        blocks.rename()

    def put(through: BlockStore) -> None:
        hashes = tuple(blocks.chain.hashes)
        through.write(BlockRun(blocks.chain.parent_of(0), hashes, tuple(blocks.source)))

    def get() -> None:
        store.read_into(blocks.chain.hashes, blocks.slots)

    write, read = ("file write", "file read") if is_local else (None, None)
    routes = [
        Route("store put", write, partial(put, store), partial(empty, store)),
        Route("store get", read, get, fills_pool=True),
    ]
    if folder is None:
        return routes
    return [
        *routes,
        Route("store get, cold", "direct read", get, partial(_forget_files, folder), True),
        Route("store put, recycling", write, partial(put, recycling), partial(empty, recycling)),
    ]


def disk_routes(blocks: Blocks, path: str) -> list[Route]:
    """The limits of a local disk with one file for all blocks, which is made at `path`."""
    calls = list(_calls(blocks.source)), list(_calls(blocks.slots))

    def write() -> None:
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            _move(os.pwritev, descriptor, calls[0])

    def read(flags: int = 0) -> None:
        with _opened(path, os.O_RDONLY | flags) as descriptor:
            _move(os.preadv, descriptor, calls[1])

    def remove() -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)

    routes = [
        Route("file write", None, write, prepare=remove),
        Route("file read", None, read, fills_pool=True),
        Route("file read, cold", None, read, lambda: _forget(path), True),
    ]
    if _is_direct_possible(path):
        routes.append(
            Route("direct read", None, lambda: read(os.O_DIRECT), lambda: _forget(path), True)
        )
    return routes


def _move(
    call: Callable[[int, Sequence[memoryview], int], int],
    descriptor: int,
    groups: Sequence[Sequence[memoryview]],
) -> None:
    """All of `groups` to or from a file; a short transfer is an error here."""
    offset = 0
    for group in groups:
        wanted = sum(piece.nbytes for piece in group)
        if call(descriptor, group, offset) != wanted:
            raise OSError(f"only a part of {wanted} bytes was moved")
        offset += wanted


def _calls(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """`buffers` in groups of at most `CALL_BYTES`."""
    step = max(1, CALL_BYTES // buffers[0].nbytes)
    for first in range(0, len(buffers), step):
        yield list(buffers[first : first + step])


def _is_direct_possible(path: str) -> bool:
    """Whether the disk takes reads that go past the page cache; memory file systems do not."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT):
            return True
    except OSError:
        return False
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _forget_files(folder: str) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _forget(os.path.join(parent, name))


def _forget(path: str) -> None:
    """Let the page cache forget a file."""
    with _opened(path, os.O_RDONLY) as descriptor:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _map(num_bytes: int) -> memoryview:
    """Page-aligned memory, in huge pages where the system gives them."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _cut(memory: memoryview, num_bytes: int) -> list[memoryview]:
    return [memory[i : i + num_bytes] for i in range(0, memory.nbytes, num_bytes)]
