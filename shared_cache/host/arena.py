"""The arena's files, as its owner makes them, and finds them again after a crash.

A crash must lose no block that was whole, and must never leave two processes with different ideas
of one file. So the header names the arena by a number that no other arena has, and by the file
system's own number of the file with the slots; what does not fit together is replaced by fresh
files, never mended. Memory is taken from the system before the first byte of an extent is used: a
process that writes to a full memory file system through a mapping is killed.
"""

import logging
import mmap
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shared_cache.errors import ConfigError
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES
from shared_cache.host.folder import ArenaPaths
from shared_cache.host.mapping import MADV_POPULATE_WRITE, map_file
from shared_cache.host.record_format import (
    HEADER_BYTES,
    DamagedRecordsError,
    Geometry,
    Header,
)
from shared_cache.host.records import Records
from shared_cache.threads import start_daemon

logger = logging.getLogger(__name__)

MIN_EXTENT_BYTES = 2 << 20
MAX_EXTENT_BYTES = 256 << 20
EXTENTS_PER_ARENA = 16
BOOT_BYTES = 16

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def geometry_for(host_bytes: int) -> Geometry:
    """How an arena of about `host_bytes` is cut: at least two extents, all of one size."""
    extent_bytes = host_bytes // EXTENTS_PER_ARENA // MIN_EXTENT_BYTES * MIN_EXTENT_BYTES
    extent_bytes = min(max(extent_bytes, MIN_EXTENT_BYTES), MAX_EXTENT_BYTES)
    return Geometry(max(2, host_bytes // extent_bytes) * extent_bytes, extent_bytes)


def host_bytes_for(block_bytes: int) -> int:
    """The smallest arena in which a block of this size fits an extent."""
    num_units = -(-block_bytes // MIN_EXTENT_BYTES)
    return num_units * MIN_EXTENT_BYTES * (EXTENTS_PER_ARENA if num_units > 1 else 2)


class OwnedArena:
    """The files of one arena, as its owner (which holds the lock) has them."""

    def __init__(self, paths: ArenaPaths, header: Header, *, was_found: bool) -> None:
        self.geometry = header.geometry
        self.boot = header.boot
        self.was_found = was_found
        self._paths = paths
        self._has_memory: set[int] = set()
        self._is_closing = False
        self._taking: threading.Thread | None = None
        self._arena_fd = os.open(paths.arena, os.O_RDWR | os.O_CLOEXEC)
        self._records_fd = os.open(paths.records, os.O_RDWR | os.O_CLOEXEC)
        self._arena = map_file(self._arena_fd, self.geometry.arena_bytes)
        self.memory = memoryview(self._arena)
        self.records = Records(
            mmap.mmap(self._records_fd, self.geometry.records_bytes), self.geometry
        )

    @classmethod
    def open(cls, paths: ArenaPaths, host_bytes: int) -> "OwnedArena":
        """The arena that a crashed owner left if it has this size, else a fresh one.

        Raises `ConfigError` when the file system has no room for `host_bytes`, or a control group
        allows less memory than that.
        """
        geometry = geometry_for(host_bytes)
        try:
            header = _read_header(paths)
            if header.geometry == geometry:
                return cls(paths, header, was_found=True)
            logger.warning("the arena %s has another size and is replaced", paths.arena)
        except FileNotFoundError:
            pass
        except DamagedRecordsError as error:
            logger.warning("the arena %s is replaced by a fresh one: %s", paths.arena, error)
        return cls(paths, _make_files(paths, geometry), was_found=False)

    def assign_extent(self, extent: int, namespace: int, slot_bytes: int) -> bool:
        """Cut an extent into slots (0: it is nobody's); False if the system has no memory for it.

        Blocks for about 0.1 s for the largest extents, unless they have their memory already.
        """
        if slot_bytes and not self._take_memory(extent, slot_bytes // SLOT_ALIGNMENT_BYTES):
            return False
        self.records.set_extent(extent, namespace, slot_bytes)
        return True

    def take_all_memory(self) -> None:
        """Take the memory of all extents from now on, in a thread; what fails is tried again later.

        Then nobody waits when one is cut into slots.
        """
        self._taking = start_daemon(self._take_all, "kvcommons-populate")

    def close(self) -> None:
        """Close the files and leave them for another owner; mappings go with their last user."""
        self._is_closing = True
        if self._taking is not None:
            self._taking.join()
        for fd in (self._arena_fd, self._records_fd):
            os.close(fd)

    def remove(self) -> None:
        """Remove the files; whoever has mapped them keeps the memory until it lets go of it."""
        for path in (self._paths.records, self._paths.arena):
            path.unlink(missing_ok=True)

    def _take_memory(self, extent: int, slot_units: int) -> bool:
        first, end = self.records.span_of(extent, slot_units)
        try:
            self._take_pages(extent)
            os.posix_fallocate(self._records_fd, first, end - first)
        except OSError as error:
            num_bytes = self.geometry.extent_bytes
            logger.warning("no memory for %d more bytes of the arena: %s", num_bytes, error)
            return False
        return True

    def _take_all(self) -> None:
        for extent in range(self.geometry.arena_bytes // self.geometry.extent_bytes):
            try:
                self._take_pages(extent)
            except OSError as error:
                logger.warning("the arena cannot have all its memory now: %s", error)
                return
            if self._is_closing:
                return

    def _take_pages(self, extent: int) -> None:
        """Raises `OSError` when the system has no memory for it.

        In short steps: a system call on a mapping keeps the interpreter's lock.
        """
        if extent in self._has_memory:
            return
        first, is_huge = extent * self.geometry.extent_bytes, _huge_pages_are_advised()
        for start in range(first, first + self.geometry.extent_bytes, MIN_EXTENT_BYTES):
            if is_huge:
                with suppress(OSError):  # then the pages are small
                    self._arena.madvise(MADV_POPULATE_WRITE, start, MIN_EXTENT_BYTES)
            os.posix_fallocate(self._arena_fd, start, MIN_EXTENT_BYTES)
            if self._is_closing:
                return
        self._has_memory.add(extent)


def _read_header(paths: ArenaPaths) -> Header:
    """What the records say, if they and the arena belong together."""
    with paths.records.open("rb") as records:
        header = Header.decode(records.read(HEADER_BYTES))
        records_bytes = os.fstat(records.fileno()).st_size
    arena = paths.arena.stat()
    if (
        header.arena_inode != arena.st_ino
        or header.geometry.arena_bytes != arena.st_size
        or header.geometry.records_bytes != records_bytes
    ):
        raise DamagedRecordsError("its files do not belong together")
    return header


def _make_files(paths: ArenaPaths, geometry: Geometry) -> Header:
    for path in (paths.records, paths.arena):
        path.unlink(missing_ok=True)
    _check_room(paths, geometry)
    _check_limit(geometry)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    arena_fd = os.open(paths.arena, flags, 0o600)
    try:
        os.ftruncate(arena_fd, geometry.arena_bytes)
        header = Header(geometry, secrets.token_bytes(BOOT_BYTES), os.fstat(arena_fd).st_ino)
    finally:
        os.close(arena_fd)
    records_fd = os.open(paths.records, flags, 0o600)
    try:
        os.ftruncate(records_fd, geometry.records_bytes)
        os.posix_fallocate(records_fd, 0, geometry.first_record_offset)
        os.pwrite(records_fd, header.encode(), 0)
    finally:
        os.close(records_fd)
    return header


def _check_room(paths: ArenaPaths, geometry: Geometry) -> None:
    system = os.statvfs(paths.folder)
    free_bytes = system.f_bavail * system.f_frsize
    if free_bytes < geometry.arena_bytes:
        raise ConfigError(
            f"cache.host.bytes asks for an arena of {geometry.arena_bytes >> 20} MiB, but "
            f"{paths.folder} has only {free_bytes >> 20} MiB free: lower cache.host.bytes, give "
            "the memory file system more room (in a container: --shm-size), or set "
            "cache.host.folder to another one"
        )


def _check_limit(geometry: Geometry) -> None:
    """Memory files count as the container's memory: beyond its limit the system kills."""
    limit_bytes = _memory_limit_bytes()
    if limit_bytes is not None and geometry.arena_bytes > limit_bytes:
        raise ConfigError(
            f"cache.host.bytes asks for an arena of {geometry.arena_bytes >> 20} MiB, but this "
            f"container or service may use only {limit_bytes >> 20} MiB of memory for all that it "
            "does: lower cache.host.bytes, or raise that limit"
        )


def _memory_limit_bytes() -> int | None:
    """The lowest limit that control groups set for the memory of this process; None: none seen."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return None
    limits: list[int] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            limits += _limits(_GROUPS / "memory", group, "memory.limit_in_bytes")
        elif not controllers:
            limits += _limits(_GROUPS, group, "memory.max")
    return min(limits, default=None)


def _limits(root: Path, group: str, name: str) -> Iterator[int]:
    """The limits of a group and of those around it; inside a container only the root is seen."""
    relative = Path(group.lstrip("/"))
    for place in (relative, *relative.parents):
        with suppress(OSError):
            text = (root / place / name).read_text().strip()
            if text.isdecimal():  # else it is "max"
                yield int(text)


def _huge_pages_are_advised() -> bool:
    """Whether memory files get huge pages where asked for: then only a mapping can ask."""
    try:
        return "[advise]" in _SHMEM_HUGE_PAGES.read_text()
    except OSError:
        return False
