"""Save jobs: runs of leased blocks on their way to a tier, and what may be made of them.

A run whose write hangs is leased still, and its slots may get other blocks as soon as the call
ends: what is written again is copied and checked first.
"""

from dataclasses import dataclass, replace

from shared_cache.checksum import block_checksum
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier
from shared_cache.stores.store import BlockRun

MERGED_BLOCKS = 64
"""Queued runs that continue each other become one object of up to so many blocks."""


@dataclass(frozen=True, slots=True)
class Save:
    """A run whose blocks lie in the slots of `leases`, in order."""

    leases: tuple[HostLease, ...]
    parent: BlockHash
    hashes: tuple[BlockHash, ...]
    tenant: bytes = b""
    num_setbacks: int = 0

    def takes(self, other: "Save") -> bool:
        """Whether `other` continues this run, and both together are small enough."""
        num_blocks = len(self.hashes) + len(other.hashes)
        continues = (other.parent, other.tenant) == (self.hashes[-1], self.tenant)
        return continues and num_blocks <= MERGED_BLOCKS

    def merged(self, other: "Save") -> "Save":
        """Both as one run, tried again as often as the one that failed more."""
        return Save(
            self.leases + other.leases,
            self.parent,
            self.hashes + other.hashes,
            self.tenant,
            max(self.num_setbacks, other.num_setbacks),
        )

    def run(self, host: HostTier) -> BlockRun:
        """The run with its bytes where they lie in host memory."""
        slots = [slot for lease in self.leases for slot in lease.slots]
        return BlockRun(
            self.parent,
            self.hashes,
            payloads=tuple(host.buffer(slot).toreadonly() for slot in slots),
            checksums=tuple(host.checksum(slot) for slot in slots),
            tenant=self.tenant,
        )


def copied_last(run: BlockRun) -> BlockRun | None:
    """The last block of a run, copied; None when its slot has another block by now."""
    last = run.tail(len(run.hashes) - 1)
    payload = memoryview(bytes(last.payloads[0]))
    if block_checksum(last.hashes[0], payload) != last.checksums[0]:
        return None
    return replace(last, payloads=(payload,))
