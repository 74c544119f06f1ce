"""The shared tier on a local disk: put, get from the page cache, get from the disk itself."""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.cases.arena import ROOT_HASH
from benchmarks.cases.rounds import Moves, Payload, new_names
from shared_cache.hashing import BlockHash
from shared_cache.namespace import Namespace
from shared_cache.stores.fs_store import open_store
from shared_cache.stores.store import BlockRun, BlockStore

OpenStore = Callable[[], BlockStore]

PIECE_BLOCKS = 8
"""Read at a time, as the fetcher does."""


class Store(Moves):
    """A block store, one run for each request's prefix; another store object reads what one wrote.

    Checksums are made before the clock starts: blocks that reach a store have theirs from the host
    tier. A new round deletes what the last one wrote, as a store at its byte budget does, where
    `deletes` says so. `piece_blocks` are read by one call.
    """

    def __init__(
        self,
        name: str,
        opened: OpenStore,
        payload: Payload,
        *,
        piece_blocks: int = PIECE_BLOCKS,
        deletes: bool = True,
    ) -> None:
        super().__init__(name, payload)
        self._piece_blocks = piece_blocks
        self._deletes = deletes
        self._store, self._reader = opened(), opened()
        self._runs: list[tuple[range, BlockRun]] = []

    def before_put(self, round_number: int) -> None:
        if self._deletes:
            for entry in list(self._store.entries()):
                self._store.delete(entry.name)
        names = new_names(f"{self.name} {round_number}", self.payload.num_blocks)
        checksums = self.payload.checksums(names)
        self._runs = [
            (
                blocks,
                BlockRun(
                    ROOT_HASH,
                    names[blocks.start : blocks.stop],
                    self.payload.payloads(blocks),
                    checksums[blocks.start : blocks.stop],
                ),
            )
            for blocks in self.payload.prefixes()
        ]

    def close(self) -> None:
        self._store.close()
        self._reader.close()

    def _pieces(self, hashes: Sequence[BlockHash]) -> Iterator[tuple[int, Sequence[BlockHash]]]:
        for start in range(0, len(hashes), self._piece_blocks):
            yield start, hashes[start : start + self._piece_blocks]

    def _put(self) -> None:
        for _, run in self._runs:
            if self._store.write(run) != len(run.hashes):
                raise SystemExit(f"{self.name}: blocks were not written")

    def _get(self) -> None:
        for blocks, run in self._runs:
            if self._reader.match(run.hashes) != len(run.hashes):
                raise SystemExit(f"{self.name}: blocks were not found")
            for start, names in self._pieces(run.hashes):
                targets = self.payload.targets(blocks[start : start + len(names)])
                if len(self._reader.read_into(names, targets)) != len(names):
                    raise SystemExit(f"{self.name}: blocks from {start} on were not read")


class ColdStore(Store):
    """The same, read from the disk: the page cache is told to forget the files before."""

    def __init__(self, name: str, opened: OpenStore, payload: Payload, folder: Path) -> None:
        super().__init__(name, opened, payload)
        self._folder = folder

    def before_get(self) -> None:
        for path in self._folder.rglob("*"):
            if path.is_file():
                forget(path)


class DirectFile(Moves):
    """The limit of the disk: one file, read past the page cache, straight into the pool."""

    def __init__(self, folder: Path, payload: Payload) -> None:
        super().__init__("o_direct", payload)
        self._path = folder / "o_direct"

    def before_put(self, round_number: int) -> None:
        self._path.unlink(missing_ok=True)

    def before_get(self) -> None:
        forget(self._path)

    def _put(self) -> None:
        with self._path.open("wb", buffering=0) as file:
            for blocks in self.payload.prefixes(PIECE_BLOCKS):
                _write_fully(file.fileno(), self.payload.payloads(blocks))
            os.fdatasync(file.fileno())

    def _get(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            for blocks in self.payload.prefixes(PIECE_BLOCKS):
                targets = self.payload.targets(blocks)
                start = blocks.start * self.payload.block_bytes
                if os.preadv(descriptor, targets, start) != len(blocks) * self.payload.block_bytes:
                    raise SystemExit("a short read past the page cache")
        finally:
            os.close(descriptor)


def has_direct_io(folder: Path) -> bool:
    """Whether files in `folder` can be read past the page cache."""
    path = folder / "probe"
    path.write_bytes(bytes(mmap.PAGESIZE))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    finally:
        path.unlink()
    return True


def forget(path: Path) -> None:
    """Have the system write this file and drop it from the page cache."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_memory(folder: Path, num_bytes: int) -> None:
    """Write and delete so many bytes: whoever writes next finds memory for the page cache.

    A virtual machine may have given free memory back to its host, and gets it again only slowly.
    """
    path, piece = folder / "warm", bytes(8 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-num_bytes // len(piece))):
            file.write(piece)
    path.unlink()


def store_in(folder: Path, space: Namespace, spare_bytes: int = 0) -> OpenStore:
    """Opens the store in `folder`; `spare_bytes` of deleted objects are kept to be written over."""
    folder.mkdir()
    return partial(open_store, folder.as_uri(), space, spare_bytes=spare_bytes)


def _write_fully(descriptor: int, payloads: Sequence[memoryview]) -> None:
    num_bytes = sum(payload.nbytes for payload in payloads)
    if os.writev(descriptor, payloads) != num_bytes:
        raise SystemExit("a short write; is the disk full?")
