"""From whatever a file system raises to a `StoreError` that says how to mend it.

Local disks raise `OSError` with an errno, object stores raise their client library's own types. The
rest of the cache only tells apart what it can act on: read-only (stop saving), full (make room),
unavailable (try again later). Programming errors (`TypeError` and the like) pass unchanged, so that
a bug is never reported as a broken store.
"""

import asyncio
import errno
import os
import re
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
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_FULL_CODES = {"XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_INSTANCE_METADATA = "169.254.169.254"


class RequestRefusedError(OSError):
    """A store understood a request and refuses it (wrong region, bad name); again is useless."""


def may_pass(error: Exception) -> bool:
    """Whether the same operation may succeed when it is tried again soon."""
    if isinstance(error, _TIMEOUTS):
        return True
    if type(error).__module__ == "builtins":
        return isinstance(error, OSError) and error.errno in _UNREACHABLE
    # What is left are our own errors, and types of the back end's library, which tell little.
    return not isinstance(
        error, (KvcommonsError, PermissionError, FileNotFoundError, RequestRefusedError)
    )


def of_object_store(error: Exception) -> Exception:
    """The built-in exception that says what obstore's does; others as they are.

    obstore has one type for all that it does not know, from a wrong region to a lost connection:
    what it was is only in the text.
    """
    if not type(error).__module__.startswith("obstore"):
        return error
    kind = type(error).__name__
    text = str(error).partition("\n\nDebug source")[0]
    status = int(found[1]) if (found := _STATUS.search(text)) else None
    code = found[1] if (found := _CODE.search(text)) else ""
    if code in _FULL_CODES or status == 507:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), text)
    if kind in _OF_KIND:
        return _OF_KIND[kind](text)
    if status == 416:
        return OSError(errno.EINVAL, "the range begins behind the end", text)
    if status == 501:
        return NotImplementedError(text)
    return _of_unknown(text, status, code)


def _of_unknown(text: str, status: int | None, code: str) -> Exception:
    if _INSTANCE_METADATA in text:
        return RequestRefusedError(
            "no credentials were given and this machine has no instance profile: set the options "
            "`key` and `secret`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment "
            f"({text})"
        )
    is_lost = (status is None and "error sending request" in text) or "body error" in text
    if is_lost or status in _PASSING_STATUS or code == "RequestTimeout":
        return ConnectionError(text)
    return RequestRefusedError(text)


_OF_KIND: dict[str, type[Exception]] = {
    "NotFoundError": FileNotFoundError,
    "PermissionDeniedError": PermissionError,
    "UnauthenticatedError": PermissionError,
    "AlreadyExistsError": FileExistsError,
    "NotSupportedError": NotImplementedError,
}


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
    return None


def _of_read(error: Exception, url: str) -> StoreError | None:
    if isinstance(error, PermissionError):
        return StoreError(
            f"{url} cannot be read: give this user permission to read and list it, or check the "
            f"credentials ({error!r})"
        )
    if isinstance(error, NotImplementedError):
        return StoreError(f"{url} cannot do what reading it needs: use another store ({error!r})")
    return None


def _of_either(error: Exception, url: str) -> StoreError | None:
    if isinstance(error, KvcommonsError) or type(error).__module__ == "builtins":
        if isinstance(error, PermissionError) or not isinstance(error, OSError):
            return None
        if isinstance(error, FileNotFoundError):
            return StoreUnavailableError(
                f"the folder or bucket of {url} does not exist: create it ({error!r})"
            )
        if not isinstance(error, _TIMEOUTS) and error.errno not in _UNREACHABLE:
            return StoreError(f"{url} failed: {error!r}")
    # Anything else is a time-out, a lost connection, or a type of the back end's own library.
    return StoreUnavailableError(
        f"{url} does not answer as it should: check the address, the network and the credentials "
        f"({error!r})"
    )
