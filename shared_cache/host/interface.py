"""The host tier's interface: verified blocks in this node's memory, ready to be copied to a device.

Reserve before writing, commit what is complete, lease before reading. A reader can therefore never
see a half-written block, and a block that somebody is about to load cannot be evicted under it.
A tier of one process (`local`) and the arena that all processes of a node share (`node`) both
implement this.

Calls come in two kinds. Those marked *in the step* are made while an engine runs a turn: they look
at what this process has leased or reserved before, and never wait. All others may ask the owner of
the node's arena; they wait for a bounded time and never raise for a tier that is away: it has no
blocks and no room until it is back.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared_cache.hashing import BlockHash

MemoryHook = Callable[[memoryview], None]

DEFAULT_PRIORITY = 35
"""TensorRT-LLM's default retention priority, of 0 (goes first) to 100 (goes last)."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a block is worth keeping: its priority, and for how many seconds it holds.

    After `ttl_s` (None: never) the block has `DEFAULT_PRIORITY` again.
    """

    priority: int = DEFAULT_PRIORITY
    ttl_s: float | None = None


DEFAULT_RETENTION = Retention()


@dataclass(frozen=True, slots=True)
class NewRun:
    """Consecutive blocks of one chain that are entering the host tier; `parent` precedes them.

    `tenant` is who pays for them (`ReuseScope.tenant`; empty: nobody). `is_stored` says that the
    shared tier has them already. `checksums` (one for each block) are those of bytes that were
    verified on their way here; empty: the tier computes them.
    """

    parent: BlockHash
    hashes: tuple[BlockHash, ...]
    tenant: bytes = b""
    is_stored: bool = False
    checksums: tuple[int, ...] = ()
    retention: Retention = DEFAULT_RETENTION


@dataclass(frozen=True, slots=True)
class HostLease:
    """The right to read `slots`, consecutive blocks of the chain asked for, until released.

    `slots[i]` holds block i of the lease. `to_store` are the positions of blocks that the holder is
    asked to write to the shared tier, as nobody has, or look up there, as that is long ago; it
    answers with `HostTier.stored`.
    `num_from_peers` blocks were brought here by another process. An empty lease needs no release
    but allows it.
    """

    lease_id: int
    slots: tuple[int, ...]
    to_store: tuple[int, ...] = ()
    num_from_peers: int = 0


@dataclass(frozen=True, slots=True)
class HostClaim:
    """What is here of a run, and room for what follows: each block is fetched by one process only.

    `lease` holds the leading blocks; `slots` are reserved for those right behind, to be written and
    committed (or cancelled) by the caller. `is_coming` tells that the first block behind both is
    being written by another process: ask again.
    """

    lease: HostLease
    slots: tuple[int, ...]
    is_coming: bool = False


@dataclass(frozen=True, slots=True)
class HostStats:
    """Counts of the host tier for one namespace; `free + used + reserved == num_slots` always.

    `num_slots` is what this namespace can hold without taking from others: memory that other
    namespaces have does not count (`HostTier.num_slots` counts it). `evicted_blocks` only grows.
    `is_connected` is False while the arena's owner is away.
    """

    num_slots: int
    free_slots: int
    used_slots: int
    reserved_slots: int
    leased_slots: int
    evicted_blocks: int
    block_bytes: int
    peer_blocks: int = 0
    is_connected: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Where blocks lie, in words that all processes of this node understand.

    `memory` names a mapping (empty: this process's own), `slots` are numbers in it (type code I),
    without gaps between neighbours.
    """

    memory: bytes
    slots: "array[int]"


@dataclass(frozen=True, slots=True)
class PlacedBlocks:
    """Blocks in one piece of memory: block i has `block_bytes` bytes from `starts[i]` on.

    A prefix has a thousand of them, and the step has no time for a thousand views.
    """

    memory: memoryview
    starts: Sequence[int]
    block_bytes: int

    def views(self) -> list[memoryview]:
        """Each block's bytes."""
        memory, size = self.memory, self.block_bytes
        return [memory[start : start + size] for start in self.starts]


class HostTier(ABC):
    """Verified blocks of one namespace in this node's memory. Thread-safe; no method does file I/O.

    A slot is a number that means something to this tier alone; it fits 32 bits.
    """

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Blocks that the tier could hold; constant, asks nobody."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block; constant, asks nobody."""

    @abstractmethod
    def lease(self, hashes: Sequence[BlockHash], first: int = 0) -> HostLease:
        """Lease the leading blocks of `hashes[first:]` that are here; they stay until `release`.

        All of `hashes` that are here, those before `first` too, count as asked for.
        """

    @abstractmethod
    def lease_held(self, hashes: Sequence[BlockHash]) -> HostLease:
        """Lease once more the leading blocks that this process has leased now; *in the step*.

        A tier that knows all blocks without asking may lease others too. `to_store` is empty.
        """

    @abstractmethod
    def release(self, lease: HostLease) -> None:
        """End a lease; a second release is a no-op; *in the step*."""

    @abstractmethod
    def claim(self, hashes: Sequence[BlockHash], wait_s: float = 0.0) -> HostClaim:
        """Lease what is here of `hashes`, and reserve slots for the missing blocks behind that.

        Slots end before a block that another process is writing; if that is the very first missing
        one, waits up to `wait_s` for it. Evicts unleased blocks if need be; fewer or no slots when
        everything is leased or reserved.
        """

    @abstractmethod
    def reserve(self, num_slots: int) -> tuple[int, ...]:
        """Take up to `num_slots` slots to write new blocks into; *in the step*.

        Each slot must be given back by `commit` or `cancel`.
        """

    @property
    def num_reserved_ahead(self) -> int | None:
        """How many slots `reserve` would give now; None: as many as can be had; *in the step*."""
        return None

    def reserve_more_ahead(self) -> None:  # noqa: B027 - where nothing is reserved ahead
        """More slots than `num_reserved_ahead` are wanted soon; *in the step*."""

    @abstractmethod
    def commit(self, slots: Sequence[int], run: NewRun) -> HostLease:
        """Publish written slots as the blocks of `run` and lease them in one step.

        A block that is present already keeps its old slot and the new one becomes free: the lease
        names the slots that hold the blocks now. The lease is shorter than `run` when the tier is
        away, or the tenant's quota is used up by blocks that may not go; the other slots are free.
        Raises `ValueError` for slots that are not reserved; nothing is published then.
        """

    @abstractmethod
    def cancel(self, slots: Sequence[int]) -> None:
        """Give reserved slots back unwritten; *in the step*."""

    @abstractmethod
    def stored(self, hashes: Sequence[BlockHash], is_stored: bool) -> None:
        """The answer to `HostLease.to_store`: written (or there already), or given up.

        Also told without being asked, of blocks that the shared tier has, or has lost.
        """

    def in_use(self, hashes: Sequence[BlockHash]) -> frozenset[BlockHash]:
        """Those that are here and leased by anybody, or were asked for in the last minutes.

        Nothing while the owner is away. For whoever deletes blocks elsewhere.
        """
        return frozenset()

    @abstractmethod
    def pin(self, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """Keep the leading blocks that are here from eviction for `ttl_s`; how many those are.

        0 ends their pins. At most 30 days at a time; raises `ValueError` for a negative or endless
        time. Pins, and the priorities and times of `Retention`, do not survive a restart of the
        arena's owner.
        """

    @abstractmethod
    def buffer(self, slot: int) -> memoryview:
        """The bytes of one slot, page-aligned; *in the step*.

        Writable while reserved, read-only by convention while leased.
        """

    @abstractmethod
    def place(self, slots: Sequence[int]) -> Place:
        """Where these slots of one lease lie, for another process of this node; *in the step*."""

    @abstractmethod
    def blocks_at(self, place: Place) -> PlacedBlocks:
        """The bytes of blocks that some process of this node has leased; *in the step*.

        Raises `HostMemoryGoneError` when this process cannot reach that memory any more.
        """

    @abstractmethod
    def checksum(self, slot: int) -> int:
        """The checksum (`block_checksum`) of the block in a slot that is leased; *in the step*."""

    @abstractmethod
    def stats(self) -> HostStats:
        """A consistent snapshot of the counts."""

    def drop(self, hashes: Sequence[BlockHash]) -> int:
        """Forget blocks whose bytes are damaged, where nobody leases them; how many those were."""
        return 0

    @abstractmethod
    def show_memory(self, hook: MemoryHook) -> None:
        """Call `hook` with all memory that slots lie in: what there is now, and later what comes.

        Each part is shown once, before its slots are given out, and not in the step. What `hook`
        raises is counted and logged.
        """

    def close(self) -> None:  # noqa: B027 - a tier of one process holds nothing beyond its memory
        """Give back leases, reservations and the mapping; the tier is not used afterwards."""
