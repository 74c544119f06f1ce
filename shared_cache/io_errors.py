"""From whatever a file system raises to a `StoreError` that says how to mend it.

Local disks raise `OSError` with an errno, object stores raise their client library's own types. The
rest of the cache only tells apart what it can act on: read-only (stop saving), full (make room),
unavailable (try again later). Programming errors (`TypeError` and the like) pass unchanged, so that
a bug is never reported as a broken store.
"""

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from shared_cache.errors import (
    KvcommonsError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnavailableError,
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_UNREACHABLE = {
    errno.EIO,
    errno.EBUSY,
    errno.ESTALE,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),
}
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, ConnectionError)


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Run a block that reads the store at `url`; what it raises becomes a `StoreError`."""
    try:
        yield
    except Exception as error:
        translated = _of_either(error, url) or _of_read(error, url)
        if translated is None:
            raise
        raise translated from error


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Run a block that writes to the store at `url`; what it raises becomes a `StoreError`."""
    try:
        yield
    except Exception as error:
        translated = _of_write(error, url) or _of_either(error, url)
        if translated is None:
            raise
        raise translated from error


def _of_write(error: Exception, url: str) -> StoreError | None:
    code = error.errno if isinstance(error, OSError) else None
    if code in _FULL:
        return StoreFullError(f"no room left in {url}: free some, or raise its quota ({error})")
    if code in _READ_ONLY or isinstance(error, (PermissionError, NotImplementedError)):
        return StoreReadOnlyError(
            f"{url} cannot be written to: give this user permission to write ({error!r})"
        )
    if isinstance(error, FileNotFoundError):
        return StoreUnavailableError(
            f"the folder or bucket of {url} does not exist: create it ({error!r})"
        )
    return None


def _of_read(error: Exception, url: str) -> StoreError | None:
    if isinstance(error, PermissionError):
        return StoreError(
            f"{url} cannot be read: give this user permission to read and list it, or check the "
            f"credentials ({error!r})"
        )
    return None


def _of_either(error: Exception, url: str) -> StoreError | None:
    if isinstance(error, KvcommonsError) or type(error).__module__ == "builtins":
        if isinstance(error, PermissionError) or not isinstance(error, OSError):
            return None
        if not isinstance(error, _TIMEOUTS) and error.errno not in _UNREACHABLE:
            return StoreError(f"{url} failed: {error!r}")
    # Anything else is a time-out, a lost connection, or a type of the back end's own library.
    return StoreUnavailableError(
        f"{url} does not answer as it should: check the address, the network and the credentials "
        f"({error!r})"
    )
