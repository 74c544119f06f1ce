"""Spare files: what deletion frees is overwritten by the next object instead of given back.

Writing a new file is bound by the kernel's allocation of memory and disk for it, at about half the
speed of overwriting one that has both. A store at its budget deletes as much as it writes, so its
deleted files serve as the next ones. Failure prevented: foreign bytes taken for a block. A reader
that still has a deleted file open sees it change under its hands: to it the block is damaged, since
every checksum is seeded from the block's name, and looking again it finds the name gone. A file
that somebody else might still want (another owner, a second hard link) is never overwritten.
"""

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

SPARE_FOLDER = "spare"
MAX_SPARE_BYTES = 256 << 20
SPARE_SHARE = 0.05

STALE_SPARE_S = 86400.0
"""Spares that nobody has taken for so long are given back: the store has stopped growing."""

_MAX_SPARES = 64
_MAX_WASTE = 2
_LOCAL_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "f2fs", "btrfs", "tmpfs", "overlay"})
_SPARE = re.compile(r"(\d+)-[0-9a-f]{16}")


def spare_bytes_of(max_bytes: int | None) -> int:
    """How many bytes of spare files suit a store with this budget; none without one."""
    return min(MAX_SPARE_BYTES, int(max_bytes * SPARE_SHARE)) if max_bytes else 0


class SpareFiles:
    """At most `max_bytes` of spare files in `folder`; for any number of threads and processes.

    The bound may be passed for a moment when several processes delete at once.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._can_keep: bool | None = None

    def keep(self, path: str) -> bool:
        """Take the file `path` away as a spare; False, and nothing done, where that may not be.

        Raises `FileNotFoundError` when it is gone.
        """
        if not self._max_bytes or not _is_replaceable(status := os.lstat(path)):
            return False
        sizes = [size for size, _ in self._spares()]
        is_full = len(sizes) >= _MAX_SPARES or sum(sizes) + status.st_size > self._max_bytes
        if is_full or not self._is_usable():
            return False
        spare = f"{self._folder}/{status.st_size}-{secrets.token_hex(8)}"
        os.rename(path, spare)
        with suppress(FileNotFoundError):
            os.utime(spare)
        return True

    def claim(self, path: str, num_bytes: int) -> int | None:
        """A descriptor to overwrite the file `path`, a spare until now; None: none that suits.

        `path` is nobody's yet, and the file is the caller's alone. It may be shorter or longer than
        the `num_bytes` that are to be written.
        """
        spares = list(self._spares()) if self._max_bytes else []
        while (size := best_fit([size for size, _ in spares], num_bytes)) is not None:
            spare = next(spare for spare in spares if spare[0] == size)
            spares.remove(spare)
            if (descriptor := self._take(spare[1], path)) is not None:
                return descriptor
        return None

    def give_back(self, unused_s: float = 0.0) -> None:
        """Remove the spares that nobody has taken for so long."""
        oldest_s = time.time() - unused_s
        for _, spare in self._spares():
            with suppress(FileNotFoundError):
                if os.stat(spare).st_mtime <= oldest_s:
                    os.unlink(spare)

    def _spares(self) -> Iterator[tuple[int, str]]:
        """Size and path of every spare."""
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            if found := _SPARE.fullmatch(name):
                yield int(found.group(1)), f"{self._folder}/{name}"

    def _take(self, spare: str, path: str) -> int | None:
        """Only one of several takers succeeds: renaming is atomic."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.utime(spare, follow_symlinks=False)  # else it might look like a stale temporary file
            os.rename(spare, path)
        except FileNotFoundError:
            return None
        if _is_replaceable(os.lstat(path)):
            return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.unlink(path)
        return None

    def _is_usable(self) -> bool:
        """Whether there can be spares here: a local disk, and a folder on it for them."""
        if self._can_keep is None:
            parent = os.path.dirname(self._folder)
            self._can_keep = file_system_of(parent) in _LOCAL_SYSTEMS
        if self._can_keep:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
        return self._can_keep


def best_fit(sizes: Sequence[int], num_bytes: int) -> int | None:
    """The size of the spare to overwrite with `num_bytes`: the least that holds them, or the most.

    None when all of them are more than twice as large: to cut those would waste what they are for.
    """
    fitting = [size for size in sizes if num_bytes <= size <= _MAX_WASTE * num_bytes]
    smaller = [size for size in sizes if size < num_bytes]
    return min(fitting) if fitting else max(smaller, default=None)


def file_system_of(path: str) -> str | None:
    """The type of the file system that `path` lies on; None where that cannot be told."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for mount in mounts:
                if mount.split(" ", 3)[2] == number:
                    return mount.partition(" - ")[2].split(" ", 1)[0]
    except OSError:
        return None
    return None


def _is_replaceable(status: os.stat_result) -> bool:
    """Whether a file may be overwritten: ours, and under one name only."""
    is_ours = status.st_uid == os.geteuid() and status.st_nlink == 1
    return is_ours and stat.S_ISREG(status.st_mode) and status.st_size > 0
