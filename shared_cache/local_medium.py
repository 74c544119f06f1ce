"""Objects on a local or mounted disk, by system calls: no layer between disk and host memory.

Reads go straight into the caller's buffers and writes straight from them, several blocks a call; a
library that returns fresh bytes instead is up to ten times slower, because fresh memory is. An
object appears by a hard link, which, unlike a rename, never replaces what another writer has
published under the same name.
"""

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress

from shared_cache.medium import (
    STALE_TEMPORARY_S,
    Medium,
    Reader,
    advance,
    batches,
    is_temporary,
    temporary_name,
)

logger = logging.getLogger(__name__)

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


class LocalMedium(Medium):
    """A folder of a local or mounted disk."""

    def prepare(self) -> None:
        """See `Medium.prepare`."""
        os.makedirs(self.folder, exist_ok=True)

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
        descriptor = _create(temporary)
        try:
            try:
                for batch in batches(parts):
                    _write_fully(descriptor, batch)
            finally:
                os.close(descriptor)
            return _appear(temporary, path, replace)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def list(self) -> Iterator[tuple[str, int]]:
        """See `Medium.list`."""
        oldest_s = time.time() - STALE_TEMPORARY_S
        for folder, _, files in os.walk(self.folder, onerror=_raise_unless_gone):
            for file in files:
                path = os.path.join(folder, file)
                try:
                    status = os.stat(path)
                except FileNotFoundError:
                    continue
                if not is_temporary(file):
                    yield os.path.relpath(path, self.folder), status.st_size
                elif status.st_mtime < oldest_s:
                    _remove_stale(path)

    def remove(self, name: str) -> None:
        """See `Medium.remove`."""
        with suppress(FileNotFoundError):
            os.unlink(self.path(name))


class _LocalReader(Reader):
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, start: int, num_bytes: int) -> bytes:
        return os.pread(self._descriptor, num_bytes, start)

    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        num_filled = 0
        for batch in batches(buffers):
            while batch:
                num_read = os.preadv(self._descriptor, batch, start + num_filled)
                if not num_read:
                    return num_filled
                num_filled += num_read
                batch = advance(batch, num_read)
        return num_filled

    def close(self) -> None:
        os.close(self._descriptor)


def _create(path: str) -> int:
    """A descriptor to write the new file `path`, whose folder is made if need be."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


def _write_fully(descriptor: int, buffers: list[memoryview]) -> None:
    while buffers:
        buffers = advance(buffers, os.writev(descriptor, buffers))


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
