"""Where a node's arenas live: the folder, its files and their locks.

Whoever can write here can put wrong tokens into every answer of the node, and whoever can read here
reads everybody's prompts. So the folder must be a real one, ours, and closed to all others. Who is
alive is told by locks that the system takes back from a dead process, never by process numbers,
which are used again.
"""

import fcntl
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError

MEMORY_FOLDER = Path("/dev/shm")
MAX_SOCKET_PATH_BYTES = 107
"""The system's limit for the path of a Unix socket."""


@dataclass(frozen=True, slots=True)
class ArenaPaths:
    """The files of one arena."""

    folder: Path
    name: str

    @property
    def arena(self) -> Path:
        """The slots and nothing else."""
        return self.folder / f"{self.name}.arena"

    @property
    def records(self) -> Path:
        """What lies in which slot; written by the owner alone."""
        return self.folder / f"{self.name}.records"

    @property
    def socket(self) -> Path:
        """Where the owner listens."""
        return self.folder / f"{self.name}.sock"

    @property
    def lock(self) -> Path:
        """Locked by the living owner."""
        return self.folder / f"{self.name}.lock"

    @property
    def starter(self) -> Path:
        """Locked by the client that is starting an owner."""
        return self.folder / f"{self.name}.starter"

    @property
    def log(self) -> Path:
        """What an owner that was started in the background has to say."""
        return self.folder / f"{self.name}.log"

    @property
    def clients(self) -> Path:
        """The folder of the clients' own files, each locked by its living client."""
        return self.folder / f"{self.name}.clients"

    def client(self, holder: int) -> Path:
        """The file of one client."""
        return self.clients / f"{holder:016x}"


def open_folder(config: HostConfig) -> ArenaPaths:
    """The paths of the arena that `config` names, in a folder that is safe to use.

    Makes the folder if it is missing. Raises `ConfigError` if it cannot be made, is another user's
    or open to others, or the paths would be too long.
    """
    folder = Path(config.folder) if config.folder else _default_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder} for the host tier ({error}); set "
            "cache.host.folder to one on a memory file system that this user may write to"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder of user {os.geteuid()} with mode 0700, as all prompts of "
            f"this node lie in it (found: user {found.st_uid}, {stat.filemode(found.st_mode)}); "
            "mend or remove it, or set cache.host.folder to another one"
        )
    paths = ArenaPaths(folder, config.name)
    if len(os.fsencode(paths.socket)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{paths.socket} is too long for a socket (at most {MAX_SOCKET_PATH_BYTES} bytes); "
            "shorten cache.host.folder or cache.host.name"
        )
    return paths


def _default_folder() -> Path:
    base = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else Path(tempfile.gettempdir())
    return base / f"kvcommons-{os.geteuid()}"


class HeldLock:
    """A file that this process has locked; the system unlocks it when the process dies."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path) -> "HeldLock | None":
        """Make and lock the file at `path`; None if it is locked by somebody else."""
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            lock = cls(path, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.release()
                return None
            if lock.is_in_place():
                return lock
            lock.release()  # its last owner removed it while we opened it

    def fileno(self) -> int:
        """The descriptor of the locked file."""
        return self._fd

    def is_in_place(self) -> bool:
        """Whether the file at the path still is the locked one."""
        if self._fd < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.stat())
        except FileNotFoundError:
            return False

    def note(self, text: str) -> None:
        """Write `text` into the file, for people to read."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def touch(self) -> None:
        """Mark the file as changed now."""
        os.utime(self._fd)

    def release(self, *, remove: bool = False) -> None:
        """Unlock, and remove the file if wanted; a second release is a no-op.

        In a forked child this closes the child's copy only: the parent keeps its lock.
        """
        if self._fd < 0:
            return
        if remove and self.is_in_place():
            self.path.unlink()
        os.close(self._fd)
        self._fd = -1


class ClientFile:
    """The locked file by which an owner knows that a client lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: HeldLock | None = None
        self._guard = threading.Lock()
        self._has_left = False

    def lend(self, to: Callable[[int], None]) -> None:
        """Call `to` with the descriptor of the locked file; nothing happens where there is none."""
        with self._guard:
            if self._lock is not None:
                to(self._lock.fileno())

    def keep(self) -> bool:
        """Have it, whoever may have removed it; raises `OSError` if that cannot be done now.

        Whether it was made anew.

        A former one stays locked until the new one is: there is no moment in which we seem dead.
        """
        with self._guard:
            if self._has_left:
                raise ConnectionAbortedError("this client has ended")
            former = self._lock
            if former is not None and former.is_in_place():
                return False
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            lock = HeldLock.acquire(self._path)
            if lock is None:
                raise BlockingIOError(f"{self._path} is locked")
            lock.note(f"{os.getpid()}")
            self._lock = lock
            if former is not None:
                former.release()
            return True

    def leave(self) -> None:
        """Let go of it for good, and remove it."""
        with self._guard:
            self._has_left = True
            if self._lock is not None:
                self._lock.release(remove=True)
                self._lock = None

    def abandon_in_child(self) -> None:
        """In a forked child: let go of it for good without a word."""
        self._guard = threading.Lock()
        self._has_left = True
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class WatchedFile:
    """A client's file as the owner has it open: tells of the client's death if removed, too."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` if the file is not there, or cannot be opened."""
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def is_locked(self) -> bool:
        """Whether the client lives, be it by this file or by one that took its place."""
        return _is_fd_locked(self._fd) or is_locked(self._path)

    def close(self) -> None:
        """Look at it no more."""
        os.close(self._fd)


def remove_if_unlocked(path: Path) -> bool:
    """Whether nobody has locked this file; then it is removed, under our lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    lock = HeldLock(path, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.release()
        return False
    is_ours = lock.is_in_place()
    lock.release(remove=True)
    return is_ours


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of this file; False if there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return _is_fd_locked(fd)
    finally:
        os.close(fd)


def _is_fd_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
