"""Objects behind an fsspec file system: object stores, and everything else that can rename.

`fs` is such a file system, made elsewhere; this module does not import fsspec. Failure prevented:
half an upload under a good name. A buffered fsspec file that is closed after an error uploads what
it has, so object stores get one `pipe_file` instead; other systems get a temporary name first,
because there `pipe_file` is not atomic at all.
"""

import errno
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from typing import Any

from shared_cache.medium import (
    STALE_TEMPORARY_S,
    Medium,
    Reader,
    batches,
    is_temporary,
    temporary_name,
)

logger = logging.getLogger(__name__)


class FsspecMedium(Medium):
    """What the fsspec media have in common."""

    def __init__(self, fs: Any, folder: str) -> None:
        super().__init__(folder)
        self._fs = fs

    def list(self) -> Iterator[tuple[str, int]]:
        """See `Medium.list`."""
        self._fs.invalidate_cache(self.folder)
        try:
            found = self._fs.find(self.folder, detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            name = path[len(self.folder) :].lstrip("/")
            if is_temporary(name):
                self._remove_if_stale(path)
            else:
                yield name, info.get("size") or 0

    def remove(self, name: str) -> None:
        """See `Medium.remove`."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def _remove_if_stale(self, path: str) -> None:
        try:
            if self._fs.modified(path).timestamp() < time.time() - STALE_TEMPORARY_S:
                self._fs.rm_file(path)
        except (NotImplementedError, OSError) as error:  # not every back end tells a time
            logger.debug("left a temporary file: %r", error)


class ObjectMedium(FsspecMedium):
    """A prefix of an object store, or of fsspec's memory: whole uploads, ranged downloads."""

    def prepare(self) -> None:
        """Object stores have no folders."""

    def check_readable(self, root: str) -> None:
        """See `Medium.check_readable`; an empty prefix is as good as a full one."""
        with suppress(FileNotFoundError):
            self._fs.cat_file(self.path("namespace.json"))

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """See `Medium.open`."""
        return closing(_RangeReader(self._fs, self.path(name)))

    def publish(self, name: str, parts: Sequence[memoryview], *, replace: bool = False) -> bool:
        """See `Medium.publish`; replaces always. Makes one copy."""
        self._fs.pipe_file(self.path(name), b"".join(parts))
        return True


class RenamingMedium(FsspecMedium):
    """A folder of any other file system: a temporary file, then a rename."""

    def prepare(self) -> None:
        """See `Medium.prepare`."""
        self._fs.makedirs(self.folder, exist_ok=True)

    def check_readable(self, root: str) -> None:
        """See `Medium.check_readable`."""
        self._fs.ls(root, detail=False)

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """See `Medium.open`."""
        return closing(_FileReader(self._fs.open(self.path(name), "rb")))

    def publish(self, name: str, parts: Sequence[memoryview], *, replace: bool = False) -> bool:
        """See `Medium.publish`."""
        path = self.path(name)
        temporary = temporary_name(path)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            with self._fs.open(temporary, "wb") as file:
                for batch in batches(parts):
                    for piece in batch:
                        file.write(piece)
            self._fs.invalidate_cache(path.rpartition("/")[0])
            if self._fs.exists(path):
                if not replace:
                    return False
                self._fs.rm_file(path)
            self._fs.mv(temporary, path)
            return True
        finally:
            self._remove_temporary(temporary)

    def _remove_temporary(self, path: str) -> None:
        try:
            if self._fs.exists(path):
                self._fs.rm_file(path)
        except OSError as error:
            logger.debug("left a temporary file: %r", error)


class _RangeReader(Reader):
    """Ranged reads without a position: files that fsspec's memory opens share theirs."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path

    def read(self, start: int, num_bytes: int) -> bytes:
        try:
            data: bytes = self._fs.cat_file(self._path, start=start, end=start + num_bytes)
        except OSError as error:
            if error.errno == errno.EINVAL:  # S3's "invalid range": the object ends before `start`
                return b""
            raise
        return data[:num_bytes]

    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        num_filled = 0
        for batch in batches(buffers):
            wanted = sum(piece.nbytes for piece in batch)
            data = memoryview(self.read(start + num_filled, wanted))
            for piece in batch:
                part, data = data[: piece.nbytes], data[piece.nbytes :]
                piece[: part.nbytes] = part
                num_filled += part.nbytes
                if part.nbytes < piece.nbytes:
                    return num_filled
        return num_filled


class _FileReader(Reader):
    """Reads through an opened file, into the caller's buffers where the file can do that."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, start: int, num_bytes: int) -> bytes:
        self._file.seek(start)
        data: bytes = self._file.read(num_bytes)
        return data

    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        self._file.seek(start)
        num_filled = 0
        for buffer in buffers:
            rest = buffer.cast("B")
            while rest.nbytes:
                num_read = self._read_some(rest)
                if not num_read:
                    return num_filled
                num_filled += num_read
                rest = rest[num_read:]
        return num_filled

    def close(self) -> None:
        self._file.close()

    def _read_some(self, buffer: memoryview) -> int:
        if hasattr(self._file, "readinto"):
            num_read: int = self._file.readinto(buffer)
            return num_read
        data: bytes = self._file.read(buffer.nbytes)
        buffer[: len(data)] = data
        return len(data)
