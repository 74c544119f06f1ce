"""The arena as a client has it mapped: bytes of slots, their checksums, extents as they are used.

The first touch of a page in every process is a trap into the system, eight times slower than the
copy. It is taken outside the engine's step, in the background, when the first slot of an extent
comes into sight; and a device's driver is told of that memory before anybody copies from it.
"""

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shared_cache.faults import FaultLog
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES
from shared_cache.host.folder import ArenaPaths
from shared_cache.host.interface import MemoryHook, PlacedBlocks
from shared_cache.host.record_format import (
    HEADER_BYTES,
    PAYLOAD_CHECKSUM_OFFSET,
    DamagedRecordsError,
    Header,
    decode_payload_checksum,
)
from shared_cache.parallel import run_all
from shared_cache.readers.memory import address_of
from shared_cache.threads import IoThreads

MADV_POPULATE_WRITE = 23

_TOUCH_BYTES = 2 << 20


def map_file(fd: int, num_bytes: int) -> mmap.mmap:
    """A shared mapping, in huge pages where the system can."""
    mapping = mmap.mmap(fd, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # only advice; kernels without huge pages refuse it
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class MappedArena:
    """One arena as a client sees it: the slots of its own namespace, and their checksums.

    Slots have numbers from `base` on, so that a slot of this arena cannot be taken for one of an
    arena that was there before.
    """

    def __init__(self, header: Header, fds: tuple[int, int], block_bytes: int, base: int) -> None:
        geometry = header.geometry
        arena_fd, records_fd = fds
        self.boot = header.boot
        self.base = base
        self.end = base + geometry.num_units
        self.extent_units = geometry.extent_units
        self.block_bytes = block_bytes
        self._geometry = geometry
        self.slot_units = -(-block_bytes // SLOT_ALIGNMENT_BYTES)
        self.num_extents = geometry.num_extents
        self.slots_per_extent = geometry.extent_units // self.slot_units
        self.num_slots = geometry.num_extents * self.slots_per_extent
        self._arena = map_file(arena_fd, geometry.arena_bytes)
        self._memory = memoryview(self._arena)
        self.address = address_of(self._memory)
        self.num_bytes = geometry.arena_bytes
        self.file = os.dup(arena_fd)
        weakref.finalize(self, os.close, self.file).atexit = False
        self._records = mmap.mmap(records_fd, geometry.records_bytes, access=mmap.ACCESS_READ)

    @classmethod
    def open(
        cls, paths: ArenaPaths, boot: bytes, block_bytes: int, others: "Sequence[MappedArena]" = ()
    ) -> "MappedArena":
        """Map the arena that is `boot`, with slot numbers that none of `others` has.

        Raises `FileNotFoundError` when another arena took its place.
        """
        arena_fd = os.open(paths.arena, os.O_RDWR | os.O_CLOEXEC)
        try:
            records_fd = os.open(paths.records, os.O_RDONLY | os.O_CLOEXEC)
            try:
                header = Header.decode(os.pread(records_fd, HEADER_BYTES, 0))
                if header.boot != boot or header.arena_inode != os.fstat(arena_fd).st_ino:
                    raise FileNotFoundError(errno.ENOENT, "replaced", str(paths.arena))
                base = _free_base(header.geometry.num_units, others)
                return cls(header, (arena_fd, records_fd), block_bytes, base)
            except DamagedRecordsError as error:
                raise FileNotFoundError(errno.ENOENT, str(error), str(paths.records)) from error
            finally:
                os.close(records_fd)
        finally:
            os.close(arena_fd)

    def holds(self, first: int, last: int) -> bool:
        """Whether these addresses of this process are the arena's."""
        return self.address <= first and last <= self.address + self.num_bytes

    def numbered(self, slots: Sequence[int]) -> tuple[int, ...]:
        """The owner's slots by the numbers that they have in this process."""
        return tuple([self.base + slot for slot in slots]) if self.base else tuple(slots)

    def buffer(self, slot: int) -> memoryview:
        """The bytes of one slot; `ValueError` for a number that is none of this arena's."""
        if not self.base <= slot < self.end:
            raise ValueError(f"slot {slot} is not one of the host tier's")
        start = (slot - self.base) * SLOT_ALIGNMENT_BYTES
        return self._memory[start : start + self.block_bytes]

    def blocks(self, units: NDArray[np.int64]) -> PlacedBlocks:
        """The bytes of slots, given in units from the arena's beginning.

        Raises `ValueError` where one is none of this arena's.
        """
        if len(units) and not 0 <= units.min() <= units.max() < self.end - self.base:
            raise ValueError("a place beyond the arena")
        starts: list[int] = (units * SLOT_ALIGNMENT_BYTES).tolist()
        return PlacedBlocks(self._memory, starts, self.block_bytes)

    def checksum(self, slot: int) -> int:
        """The checksum of the block in a leased slot, as its record has it."""
        offset = self._geometry.record_offset(slot - self.base, self.slot_units)
        start = offset + PAYLOAD_CHECKSUM_OFFSET
        return decode_payload_checksum(self._records[start : start + 8])

    def extent_memory(self, extent: int) -> memoryview:
        """All bytes of one extent."""
        start = extent * self._geometry.extent_bytes
        return self._memory[start : start + self._geometry.extent_bytes]

    def touch(self, extent: int) -> None:
        """Map all pages of an extent now, so that copies need not; as good as the system can."""
        start = extent * self._geometry.extent_bytes
        for offset in range(start, start + self._geometry.extent_bytes, _TOUCH_BYTES):
            self._arena.madvise(MADV_POPULATE_WRITE, offset, _TOUCH_BYTES)


def _free_base(num_units: int, others: Sequence[MappedArena]) -> int:
    """The lowest number from which on so many slot numbers are nobody's."""
    candidates = sorted((0, *(other.end for other in others)))
    return next(
        base
        for base in candidates
        if all(base + num_units <= other.base or other.end <= base for other in others)
    )


class ExtentWatch:
    """Sees to it that the memory of an extent is ready before its slots are used. Thread-safe."""

    def __init__(self, faults: FaultLog) -> None:
        self._hook: MemoryHook | None = None
        self._faults = faults
        self._lock = threading.Lock()
        self._known: set[tuple[bytes, int]] = set()
        self._thread = IoThreads(1, "kvcommons-touch")

    def show(self, arena: MappedArena, slots: Sequence[int]) -> None:
        """These slots are about to be given to somebody; not to be called in the step."""
        units, base = arena.extent_units, arena.base
        new = {(arena.boot, (slot - base) // units) for slot in slots} - self._known
        if not new:
            return
        with self._lock:
            for boot, extent in sorted(new - self._known):
                self._call_hook(arena, extent)
                self._thread.submit(partial(_touch, arena, extent))
                self._known.add((boot, extent))

    def show_soon(self, arena: MappedArena, slots: Sequence[int]) -> None:
        """As `show`, in the background: these slots are in use already; *in the step*."""
        if any((arena.boot, (slot - arena.base) // arena.extent_units) not in self._known
               for slot in slots):  # fmt: skip
            self._thread.submit(partial(self.show, arena, slots))

    def populate(self, arena: MappedArena) -> None:
        """Have all of an arena's memory now; waits for it."""
        extents = range(arena.num_extents)
        run_all([partial(_touch, arena, extent) for extent in extents])
        self.show(arena, [arena.base + extent * arena.extent_units for extent in extents])

    def show_to(self, hook: MemoryHook, arenas: Sequence[MappedArena]) -> None:
        """Call `hook` with every extent that was shown already, and with those to come."""
        with self._lock:
            self._hook = hook
            for arena in arenas:
                for boot, extent in sorted(self._known):
                    if boot == arena.boot:
                        self._call_hook(arena, extent)

    def _call_hook(self, arena: MappedArena, extent: int) -> None:
        if self._hook is not None:
            with self._faults.caught("preparing an extent"):
                self._hook(arena.extent_memory(extent))

    def close(self) -> None:
        """End the thread."""
        self._thread.close(1.0)


def _touch(arena: MappedArena, extent: int) -> None:
    with suppress(OSError):  # an older system; the copies will touch it
        arena.touch(extent)
