"""Objects on a local or mounted disk, by system calls: no layer between disk and host memory.

Reads go straight into the caller's buffers and writes straight from them, several blocks a call; a
library that returns fresh bytes instead is up to ten times slower, because fresh memory is. Writes
prefer the files of deleted objects (`spares`) for the same reason. An object appears by a hard
link, which, unlike a rename, never replaces what another writer has published under that name.
"""

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress

from shared_cache.media import page_cache
from shared_cache.media.medium import (
    STALE_TEMPORARY_S,
    ListedObject,
    Medium,
    Reader,
    advance,
    batches,
    is_temporary,
    temporary_name,
)
from shared_cache.media.spares import SPARE_FOLDER, STALE_SPARE_S, SpareFiles, file_system_of

logger = logging.getLogger(__name__)

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}

_FULL = {errno.ENOSPC, errno.EDQUOT}

USE_NOTED_S = 3600.0
"""The use of an object is noted no more often: each note is a write to the disk."""

_PAGE_BYTES = 4096
_SHARE_ON_DISK = 0.5
_SHARE_IN_MEMORY = 0.95
_REFUSALS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_ALLOCATES_AHEAD = frozenset({"ext4"})
"""Where it was measured that allocating a whole file first makes writing it 1.5 times as fast."""


class LocalMedium(Medium):
    """A folder of a local or mounted disk; keeps up to `spare_bytes` of deleted files for reuse."""

    read_bytes = 64 << 20

    def __init__(self, folder: str, spare_bytes: int = 0) -> None:
        super().__init__(folder)
        self._spares = SpareFiles(self.path(SPARE_FOLDER), spare_bytes)
        self._allocates_ahead = False

    def prepare(self) -> None:
        """See `Medium.prepare`."""
        os.makedirs(self.folder, exist_ok=True)
        self._allocates_ahead = file_system_of(self.folder) in _ALLOCATES_AHEAD

    def check_readable(self, root: str) -> None:
        """See `Medium.check_readable`."""
        os.scandir(root).close()

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """See `Medium.open`."""
        return closing(_LocalReader(os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)))

    def publish(self, name: str, parts: Sequence[memoryview], *, replace: bool = False) -> bool:
        """See `Medium.publish`. Not synced: after a power cut the checksums find what is lost."""
        path = self.path(name)
        temporary = temporary_name(path)
        num_bytes = sum(part.nbytes for part in parts)
        try:
            descriptor = self._spares.claim(temporary, num_bytes)
            if descriptor is None:
                descriptor = _create(temporary)
            try:
                self._make_room(descriptor, num_bytes)
                _write(descriptor, parts)
            finally:
                os.close(descriptor)
            return _appear(temporary, path, replace)
        except OSError as error:
            if error.errno in _FULL:
                self._spares.give_back()  # the next object may need their room
            raise
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def list(self, *, tidies: bool = False) -> Iterator[ListedObject]:
        """See `Medium.list`; spare files that nobody takes are left over, too."""
        oldest_s = time.time() - STALE_TEMPORARY_S
        for folder, folders, files in os.walk(self.folder, onerror=_raise_unless_gone):
            if SPARE_FOLDER in folders:
                folders.remove(SPARE_FOLDER)
                if tidies:
                    SpareFiles(os.path.join(folder, SPARE_FOLDER), 0).give_back(STALE_SPARE_S)
            for file in files:
                path = os.path.join(folder, file)
                try:
                    status = os.stat(path)
                except FileNotFoundError:
                    continue
                if not is_temporary(file):
                    name = os.path.relpath(path, self.folder)
                    yield ListedObject(name, status.st_size, status.st_mtime)
                elif tidies and status.st_mtime < oldest_s:
                    _remove_stale(path)

    def remove(self, name: str) -> None:
        """See `Medium.remove`."""
        with suppress(FileNotFoundError):
            os.unlink(self.path(name))

    def recycle(self, name: str) -> None:
        """See `Medium.recycle`."""
        with suppress(FileNotFoundError):
            if not self._spares.keep(self.path(name)):
                os.unlink(self.path(name))

    def _make_room(self, descriptor: int, num_bytes: int) -> None:
        """Cut a file that is longer than the object to come, or allocate what it lacks."""
        size = os.fstat(descriptor).st_size
        whole_pages = num_bytes - num_bytes % _PAGE_BYTES
        if size > whole_pages:  # a part of a page that is not in memory would be read to keep it
            os.ftruncate(descriptor, whole_pages)
        elif self._allocates_ahead and num_bytes > size:
            os.posix_fallocate(descriptor, 0, num_bytes)


class _LocalReader(Reader):
    """An open file. What `is_in_memory` found not to be there is read around the page cache."""

    def __init__(self, descriptor: int) -> None:
        self.file = self._descriptor = descriptor
        self._direct: int | None = None

    def read(self, start: int, num_bytes: int) -> bytes:
        return os.pread(self._descriptor, num_bytes, start)

    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        num_filled = 0
        for batch in batches(buffers):
            while batch:
                num_read = self._read_some(batch, start + num_filled)
                if not num_read:
                    return num_filled
                num_filled += num_read
                batch = advance(batch, num_read)
        return num_filled

    def is_in_memory(self, start: int, num_bytes: int) -> bool:
        share = page_cache.share_in_memory(self._descriptor, start, num_bytes)
        if share is not None and share < _SHARE_ON_DISK and self._direct is None:
            self._direct = _open_direct(self._descriptor)
        return share is not None and share > _SHARE_IN_MEMORY

    def note_use(self) -> None:
        """See `Reader.note_use`. The time of modification is the only one that a mount keeps."""
        age_s = time.time() - os.fstat(self._descriptor).st_mtime
        if abs(age_s) > USE_NOTED_S:
            with suppress(OSError):  # not our file, or a disk that may only be read
                os.utime(self._descriptor)

    def close(self) -> None:
        self._close_direct()
        os.close(self._descriptor)

    def _read_some(self, buffers: list[memoryview], start: int) -> int:
        """How many bytes one system call has read; 0 at the end of the file."""
        if self._direct is not None and _is_whole_pages(start, buffers):
            try:
                return os.preadv(self._direct, buffers, start)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._close_direct()  # buffers that begin at odd addresses, most likely
        return os.preadv(self._descriptor, buffers, start)

    def _close_direct(self) -> None:
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)


def _is_whole_pages(start: int, buffers: list[memoryview]) -> bool:
    return all(n % _PAGE_BYTES == 0 for n in (start, *(view.nbytes for view in buffers)))


def _open_direct(descriptor: int) -> int | None:
    """Another descriptor of the same file, for reading around the page cache; None if refused."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def _create(path: str) -> int:
    """A descriptor to write the new file `path`, whose folder is made if need be."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


def _write(descriptor: int, parts: Sequence[memoryview]) -> None:
    position = 0
    for batch in batches(parts):
        while batch:
            num_written = os.pwritev(descriptor, batch, position)
            position += num_written
            batch = advance(batch, num_written)


def _appear(temporary: str, path: str, replace: bool) -> bool:
    """Give a complete file its name; False when the name is taken and `replace` is False."""
    if not replace:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return True
    os.replace(temporary, path)
    return True


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _remove_stale(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        logger.debug("left a stale temporary file: %r", error)
