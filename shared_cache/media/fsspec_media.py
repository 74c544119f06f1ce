"""Objects behind an fsspec file system: object stores, and everything else that can rename.

`fs` is such a file system, made elsewhere; this module does not import fsspec. Failure prevented:
half an upload under a good name. A buffered fsspec file that is closed after an error uploads what
it has, so object stores get one `pipe_file` instead; other systems get a temporary name first,
because there `pipe_file` is not atomic at all. Operations that fail with what may pass are tried
again (`Retries`); how long a single try may hang is the back end's own setting.
"""

import errno
import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from datetime import datetime
from typing import Any

from shared_cache.media.medium import (
    STALE_TEMPORARY_S,
    ListedObject,
    Medium,
    Reader,
    batches,
    is_temporary,
    temporary_name,
)
from shared_cache.media.retries import Retries

logger = logging.getLogger(__name__)


class FsspecMedium(Medium):
    """What the fsspec media have in common."""

    def __init__(self, fs: Any, folder: str, retries: Retries | None = None) -> None:
        super().__init__(folder)
        self._fs = fs
        self._retries = retries or Retries()

    @property
    def num_retries(self) -> int:
        """See `Medium.num_retries`."""
        return self._retries.num_retries

    def list(self, *, tidies: bool = False) -> Iterator[ListedObject]:
        """See `Medium.list`."""
        try:
            found = self._retries.run(lambda _: self._find())
        except FileNotFoundError:
            return
        for path, info in found.items():
            name = path[len(self.folder) :].lstrip("/")
            if not is_temporary(name):
                yield ListedObject(name, info.get("size") or 0, _used_s(info))
            elif tidies:
                self._remove_if_stale(path)

    def remove(self, name: str) -> None:
        """See `Medium.remove`."""
        with suppress(FileNotFoundError):
            self._retries.run(lambda _: self._fs.rm_file(self.path(name)))

    def _find(self) -> dict[str, Any]:
        self._fs.invalidate_cache(self.folder)
        found: dict[str, Any] = self._fs.find(self.folder, detail=True)
        return found

    def _remove_if_stale(self, path: str) -> None:
        try:
            if self._fs.modified(path).timestamp() < time.time() - STALE_TEMPORARY_S:
                self._fs.rm_file(path)
        except (NotImplementedError, OSError) as error:  # not every back end tells a time
            logger.debug("left a temporary file: %r", error)


class ObjectMedium(FsspecMedium):
    """A prefix of an object store, or of fsspec's memory: whole uploads, ranged downloads."""

    def __init__(self, fs: Any, folder: str, retries: Retries | None = None) -> None:
        super().__init__(fs, folder, retries)
        upload = getattr(fs, "_pipe_file", fs.pipe_file)
        self._can_create = "mode" in inspect.signature(upload).parameters

    def prepare(self) -> None:
        """Object stores have no folders."""

    def check_readable(self, root: str) -> None:
        """See `Medium.check_readable`; an empty prefix is as good as a full one."""
        with suppress(FileNotFoundError):
            self._retries.run(lambda _: self._fs.cat_file(self.path("namespace.json")))

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """See `Medium.open`."""
        return closing(_RangeReader(self._fs, self.path(name), self._retries))

    def publish(self, name: str, parts: Sequence[memoryview], *, replace: bool = False) -> bool:
        """See `Medium.publish`. Makes one copy."""
        path, data = self.path(name), b"".join(parts)
        if self._can_create and not replace:
            try:
                self._retries.run(lambda _: self._fs.pipe_file(path, data, mode="create"))
            except FileExistsError:
                return False
            except NotImplementedError:
                self._can_create = False
            else:
                return True
        self._retries.run(lambda _: self._fs.pipe_file(path, data))
        return True


class RenamingMedium(FsspecMedium):
    """A folder of any other file system: a temporary file, then a rename."""

    def prepare(self) -> None:
        """See `Medium.prepare`."""
        self._retries.run(lambda _: self._fs.makedirs(self.folder, exist_ok=True))

    def check_readable(self, root: str) -> None:
        """See `Medium.check_readable`."""
        self._retries.run(lambda _: self._fs.ls(root, detail=False))

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """See `Medium.open`."""
        return closing(_FileReader(self._fs, self.path(name), self._retries))

    def publish(self, name: str, parts: Sequence[memoryview], *, replace: bool = False) -> bool:
        """See `Medium.publish`."""
        return self._retries.run(lambda _: self._publish(self.path(name), parts, replace))

    def _publish(self, path: str, parts: Sequence[memoryview], replace: bool) -> bool:
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

    def __init__(self, fs: Any, path: str, retries: Retries) -> None:
        self._fs = fs
        self._path = path
        self._retries = retries

    def read(self, start: int, num_bytes: int) -> bytes:
        return self._retries.run(lambda _: self._read(start, num_bytes))

    def _read(self, start: int, num_bytes: int) -> bytes:
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
    """Reads through an opened file, into the caller's buffers where the file can do that.

    After an error the file is opened anew: what is left of the old one is not known.
    """

    def __init__(self, fs: Any, path: str, retries: Retries) -> None:
        self._fs = fs
        self._path = path
        self._retries = retries
        self._file: Any = None

    def read(self, start: int, num_bytes: int) -> bytes:
        return self._retries.run(lambda _: self._read(start, num_bytes))

    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        return self._retries.run(lambda _: self._fill(start, buffers))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, start: int, num_bytes: int) -> bytes:
        with self._opened_at(start) as file:
            data: bytes = file.read(num_bytes)
            return data

    def _fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        with self._opened_at(start) as file:
            num_filled = 0
            for buffer in buffers:
                rest = buffer.cast("B")
                while rest.nbytes:
                    num_read = _read_some(file, rest)
                    if not num_read:
                        return num_filled
                    num_filled += num_read
                    rest = rest[num_read:]
            return num_filled

    @contextmanager
    def _opened_at(self, start: int) -> Iterator[Any]:
        try:
            if self._file is None:
                self._file = self._fs.open(self._path, "rb")
            self._file.seek(start)
            yield self._file
        except Exception:
            self.close()
            raise


def _read_some(file: Any, buffer: memoryview) -> int:
    if hasattr(file, "readinto"):
        num_read: int = file.readinto(buffer)
        return num_read
    data: bytes = file.read(buffer.nbytes)
    buffer[: len(data)] = data
    return len(data)


def _used_s(info: dict[str, Any]) -> float:
    """When a listed object was written; 0.0 where its back end does not tell."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        told = info.get(key)
        if isinstance(told, datetime):
            return told.timestamp()
        if isinstance(told, (int, float)):
            return float(told)
    return 0.0
