"""Whose turn it is to clean up a store that several processes of a machine use.

Failure prevented: every replica listing the same disk at the same moment, and one that cleans up
and does not hear what the others write.
"""

import errno
import os
from contextlib import suppress

from filelock import FileLock, Timeout

LOCK_NAME = "upkeep.lock"

DUE_NAME = "upkeep.due"
"""Touched by those who wrote a lot, or found the disk full, while another process cleans up."""


class Turn:
    """The right to clean up a local store: one process has it until it ends or gives it up.

    Without a path, and where there are no locks or the file is another user's, everybody has it.
    """

    _NO_LOCKS = frozenset(
        {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}
    )

    def __init__(self, path: str | None) -> None:
        self._lock = FileLock(path, timeout=0, thread_local=False) if path else None
        self._due_path = os.path.join(os.path.dirname(path), DUE_NAME) if path else None
        self._called_ns = 0

    def call(self) -> None:
        """Tell whoever has the right that the store may be over its budget."""
        is_ours = self._lock is not None and self._lock.is_locked
        if self._due_path is not None and not is_ours:
            # Of another user's store, or on a full disk, it is found out some rounds later.
            with suppress(OSError), open(self._due_path, "ab"):
                os.utime(self._due_path)

    def was_called(self) -> bool:
        """Whether anybody has called since this was asked last."""
        called_ns = self._called_ns
        if self._due_path is not None:
            with suppress(OSError):
                self._called_ns = os.stat(self._due_path).st_mtime_ns
        return self._called_ns != called_ns

    def take(self) -> bool:
        """True when this process has the right now."""
        if self._lock is None or self._lock.is_locked:
            return True
        try:
            self._lock.acquire()
        except Timeout:
            return False
        except NotImplementedError:
            self._lock = None
        except OSError as error:
            if error.errno not in self._NO_LOCKS:
                raise
            self._lock = None
        return True

    def give_up(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            self._lock.release()


def lock_path(url: str | None) -> str | None:
    """Where processes agree on who cleans up the store at `url`; None unless it is local."""
    protocol, _, path = (url or "").rpartition("://")
    if not path or protocol not in ("", "file", "local"):
        return None
    return os.path.join(os.path.abspath(os.path.expanduser(path)), LOCK_NAME)
