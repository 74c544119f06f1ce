"""The shared tier's interface, and its smallest implementation.

A store keeps *runs* of consecutive blocks, not single blocks: a new file or object costs about a
millisecond however small it is, so one object per block would be several times slower to write
than the medium allows. Blocks are immutable and content-named: a second write of the same block
is a no-op, and concurrent writers need no lock.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shared_cache.checksum import block_checksum
from shared_cache.hashing import BlockHash
from shared_cache.namespace import Namespace
from shared_cache.stores.store_faults import StoreFaults


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks of one chain with their bytes.

    `parent` is the hash before the first block, so `hashes[i]`'s parent is `hashes[i - 1]`.
    Each payload is one block, exactly `namespace.layout.block_bytes` long and contiguous; stores
    read the buffers and never keep them. `checksums` (`block_checksum`, one for each block) spare
    the store to compute them; empty: it does. `tenant` is who pays for them (`ReuseScope.tenant`).
    """

    parent: BlockHash
    hashes: tuple[BlockHash, ...]
    payloads: tuple[memoryview, ...]
    checksums: tuple[int, ...] = ()
    tenant: bytes = b""

    def __post_init__(self) -> None:
        if len(self.hashes) != len(self.payloads):
            raise ValueError(f"{len(self.hashes)} hashes but {len(self.payloads)} payloads")
        if self.checksums and len(self.checksums) != len(self.hashes):
            raise ValueError(f"{len(self.hashes)} hashes but {len(self.checksums)} checksums")

    def tail(self, start: int) -> "BlockRun":
        """This run without its first `start` blocks."""
        return self.part(start, len(self.hashes))

    def split(self, max_blocks: int) -> "list[BlockRun]":
        """This run in order, in parts of `max_blocks`; the last one has what is left.

        Equal parts let a reader guess where they begin (see `finding`).
        """
        return [
            self.part(start, start + max_blocks)
            for start in range(0, len(self.hashes) or 1, max_blocks)
        ]

    def part(self, start: int, stop: int) -> "BlockRun":
        """The blocks from `start` up to `stop`."""
        return BlockRun(
            self.hashes[start - 1] if start else self.parent,
            self.hashes[start:stop],
            self.payloads[start:stop],
            self.checksums[start:stop],
            self.tenant,
        )


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One stored object as listing shows it; `num_bytes` is its size in the store.

    `used_s` is when it was written or, where the medium can note that, read last (seconds since the
    epoch; 0.0 where it tells no time). `tenant` is who pays for it; empty: nobody.
    """

    name: str
    parent: BlockHash
    hashes: tuple[BlockHash, ...]
    num_bytes: int
    used_s: float = 0.0
    tenant: bytes = b""


class BlockStore(ABC):
    """Keeps verified blocks of one namespace; safe to use from several threads and processes.

    Faults of the medium raise `StoreError`. Objects that are corrupt, cut short, foreign or gone
    never raise: they are misses. Nothing here is called from an engine's step.
    """

    read_only: bool = False
    """True for a store that may be read but not written; nobody then tries to write."""

    read_bytes: int = 0
    """Reads of so many bytes are no slower than short ones, and cost their readers less."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    @property
    def faults(self) -> StoreFaults:
        """How many objects were not what they should be, since this store was opened."""
        return StoreFaults(corrupt=0, foreign=0, vanished=0)

    @property
    def num_retries(self) -> int:
        """How many operations on the medium were tries that were not the first."""
        return 0

    @abstractmethod
    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of `hashes` are stored; moves no payload bytes.

        Sees what other processes have written. A promise about the names only: `read_into` may
        still find fewer good blocks. Pass a chain from its first block on, whatever of it is at
        hand already: a store may find a run only by where it begins, and knows the inner blocks
        of those runs (here and in `read_into`) that it has come across.
        """

    @abstractmethod
    def read_into(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        """Fill `buffers[i]` with block `hashes[i]`; the verified checksums of the leading ones.

        As many blocks as there are checksums are good; the other buffers hold undefined bytes.
        Each buffer is writable, contiguous and `block_bytes` long; else `ValueError`.
        """

    @abstractmethod
    def write(self, run: BlockRun) -> int:
        """Store the blocks of `run` that are missing, leading ones first; how many were written.

        Raises `StoreReadOnlyError`, `StoreFullError` or another `StoreError`; readers then see
        what was there before, and of a long run perhaps some more leading blocks, each whole.
        """

    @abstractmethod
    def entries(self) -> Iterator[StoredRun]:
        """Every readable object of this namespace, by listing; order is undefined."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove one object by its name as `entries` gave it; one that is gone is no error."""

    def forget(self, hashes: Sequence[BlockHash]) -> int:
        """Delete the objects that hold any of these blocks; how many those were.

        `hashes` are a chain from its first block on, or single blocks. Raises `StoreError`.
        """
        wanted = set(hashes)
        names = [run.name for run in self.entries() if not wanted.isdisjoint(run.hashes)]
        for name in names:
            self.delete(name)
        return len(names)

    def refresh(self) -> int:
        """Look up, by listing, where blocks lie; how many blocks are known to be stored then.

        A store that finds runs only by where they begin finds their inner blocks too afterwards.
        Bounded, but slow: meant for the background. Raises `StoreError`.
        """
        return 0

    def refresh_in_background(self) -> None:  # noqa: B027 - most stores know where all blocks lie
        """Call `refresh` soon and now and then, until this store is closed; returns at once."""

    def close(self) -> None:  # noqa: B027 - most stores hold nothing that needs closing
        """Give back threads and connections; the store is not used afterwards."""

    def check_buffers(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview], *, writable: bool = False
    ) -> None:
        """Raise `ValueError` unless there is one contiguous, block-sized buffer for every hash."""
        if len(hashes) != len(buffers):
            raise ValueError(f"{len(hashes)} hashes but {len(buffers)} buffers")
        expected = self.namespace.layout.block_bytes
        for buffer in buffers:
            if buffer.nbytes != expected:
                raise ValueError(f"a buffer has {buffer.nbytes} bytes; a block has {expected}")
            if not buffer.c_contiguous or (writable and buffer.readonly):
                raise ValueError("a buffer is not contiguous, or read-only where bytes go into it")


class MemoryBlockStore(BlockStore):
    """A store in this process's memory: the reference the others are tested against."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace)
        self._lock = threading.Lock()
        self._blocks: dict[BlockHash, tuple[StoredRun, bytes]] = {}

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """See `BlockStore.match`."""
        with self._lock:
            return next((i for i, h in enumerate(hashes) if h not in self._blocks), len(hashes))

    def read_into(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        """See `BlockStore.read_into`."""
        self.check_buffers(hashes, buffers, writable=True)
        checksums = []
        for block_hash, buffer in zip(hashes, buffers, strict=True):
            with self._lock:
                entry = self._blocks.get(block_hash)
            if entry is None:
                break
            buffer.cast("B")[:] = entry[1]
            checksums.append(block_checksum(block_hash, buffer))
        return tuple(checksums)

    def write(self, run: BlockRun) -> int:
        """See `BlockStore.write`."""
        self.check_buffers(run.hashes, run.payloads)
        parents = (run.parent, *run.hashes)
        with self._lock:
            before = len(self._blocks)
            for parent, block_hash, payload in zip(parents, run.hashes, run.payloads, strict=False):
                size, tenant = payload.nbytes, run.tenant
                stored = StoredRun(block_hash.hex(), parent, (block_hash,), size, tenant=tenant)
                self._blocks.setdefault(block_hash, (stored, bytes(payload)))
            return len(self._blocks) - before

    def refresh(self) -> int:
        """See `BlockStore.refresh`; every block is known at all times."""
        with self._lock:
            return len(self._blocks)

    def entries(self) -> Iterator[StoredRun]:
        """See `BlockStore.entries`; every block is a run of its own."""
        with self._lock:
            blocks = list(self._blocks.values())
        for stored, _ in blocks:
            yield stored

    def delete(self, name: str) -> None:
        """See `BlockStore.delete`."""
        with self._lock:
            self._blocks.pop(BlockHash(bytes.fromhex(name)), None)
