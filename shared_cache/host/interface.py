"""The host tier's interface: verified blocks in this node's memory, ready to be copied to a device.

Reserve before writing, commit what is complete, lease before reading. A reader can therefore never
see a half-written block, and a block that somebody is about to load cannot be evicted under it.
The in-process tier and a node-shared one both implement this.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from shared_cache.hashing import BlockHash


@dataclass(frozen=True, slots=True)
class HostLease:
    """The right to read `slots`, the leading run of the hashes asked for, until released.

    `slots[i]` holds block i of the run. An empty lease needs no release but allows it.
    """

    lease_id: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HostStats:
    """Counts of the host tier; `free + used + reserved == num_slots` always."""

    num_slots: int
    free_slots: int
    used_slots: int
    reserved_slots: int
    leased_slots: int
    evicted_blocks: int
    block_bytes: int


class HostTier(ABC):
    """Verified blocks of one namespace in this node's memory. Thread-safe; no method does I/O."""

    @abstractmethod
    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are present."""

    @abstractmethod
    def lease(self, hashes: Sequence[BlockHash]) -> HostLease:
        """Lease the leading blocks that are present; they stay until `release`."""

    @abstractmethod
    def release(self, lease: HostLease) -> None:
        """End a lease; a second release is a no-op."""

    @abstractmethod
    def reserve(self, num_slots: int) -> tuple[int, ...]:
        """Take up to `num_slots` slots to write into, evicting unleased blocks if need be.

        May give fewer, or none when everything is leased or reserved. Each slot must be given back
        by `commit` or `cancel`.
        """

    @abstractmethod
    def commit(self, slots: Sequence[int], hashes: Sequence[BlockHash]) -> HostLease:
        """Publish written slots under their hashes and lease them in one step.

        `hashes` are consecutive blocks of one chain, first block first. A block that is present
        already keeps its old slot and the new one becomes free: the lease names the slots that
        hold the blocks now.
        """

    @abstractmethod
    def cancel(self, slots: Sequence[int]) -> None:
        """Give reserved slots back unwritten."""

    @abstractmethod
    def buffer(self, slot: int) -> memoryview:
        """The bytes of one slot: writable while reserved, read-only by convention while leased."""

    @abstractmethod
    def stats(self) -> HostStats:
        """A consistent snapshot of the counts."""
