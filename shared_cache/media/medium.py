"""Medium: where named objects are read, published, listed and removed; knows nothing of blocks.

There are three kinds, because publishing atomically takes three ways: local disks (system calls and
a hard link), object stores (one whole upload), and every other file system (rename). Failure
prevented: a reader that sees half an object, or a name whose content changes under those who have
read its head.
"""

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

BATCH_BYTES = 8 << 20
"""Most bytes of one system call or request: larger single writes were several times slower."""

STALE_TEMPORARY_S = 86400.0
"""Older temporary files are what a writer left that died. A clock that is set by hours while one
writes must not make its file look like that."""

_MAX_VECTORS = 1024
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp\Z")


def batches(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """`buffers` in order, in groups of at most `BATCH_BYTES`; larger ones are cut."""
    group: list[memoryview] = []
    room_bytes = BATCH_BYTES
    for buffer in buffers:
        rest = buffer.cast("B")
        while rest.nbytes:
            if not room_bytes or len(group) == _MAX_VECTORS:
                yield group
                group, room_bytes = [], BATCH_BYTES
            piece = rest[:room_bytes]
            group.append(piece)
            rest, room_bytes = rest[piece.nbytes :], room_bytes - piece.nbytes
    if group:
        yield group


def advance(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """`buffers` without their first `num_bytes`."""
    for index, buffer in enumerate(buffers):
        if num_bytes < buffer.nbytes:
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= buffer.nbytes
    return []


def temporary_name(name: str) -> str:
    """A name beside `name` that no other writer has."""
    return f"{name}.{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` made `name`."""
    return _TEMPORARY.search(name) is not None


class ListedObject(NamedTuple):
    """An object as listing shows it.

    `used_s`: when it was written or, where the medium can note that, read last; 0.0: not told.
    """

    name: str
    num_bytes: int
    used_s: float = 0.0


class Reader(ABC):
    """One object opened for reading."""

    step_bytes = BATCH_BYTES
    """How much one `fill` is best asked for: few enough bytes to be in the CPU's cache still when
    they are verified, or, from a distance, enough to have several requests in flight."""

    file: int | None = None
    """The descriptor of a file that other processes of this machine could read, too."""

    @abstractmethod
    def read(self, start: int, num_bytes: int) -> bytes:
        """The bytes from `start`, fewer where the object ends."""

    @abstractmethod
    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        """Fill `buffers` one after another from `start`; how many bytes the object had."""

    def is_in_memory(self, start: int, num_bytes: int) -> bool:
        """Whether reading these bytes is mere copying, so that several threads should share it."""
        return False

    def note_use(self) -> None:  # noqa: B027 - not every medium can note it
        """Note that the object was of use, for whoever decides what to delete."""

    def close(self) -> None:  # noqa: B027 - not every reader holds something
        """Give back what is held."""


class Medium(ABC):
    """A folder of objects. Raises what the system raises, `FileNotFoundError` for a missing name.

    Names are relative to `folder` and use `/`.
    """

    read_bytes = 0
    """How much one read should ask for at least, where long reads are no slower than short ones."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @property
    def num_retries(self) -> int:
        """How often an operation was tried again because of an error that might pass."""
        return 0

    def path(self, name: str) -> str:
        """Where the object `name` lies in the file system."""
        return f"{self.folder}/{name}"

    @abstractmethod
    def prepare(self) -> None:
        """Create the folder where the medium has such."""

    @abstractmethod
    def check_readable(self, root: str) -> None:
        """Raise unless `root`, a folder above this one, can be read."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[Reader]:
        """Open an object for reading."""

    @abstractmethod
    def publish(self, name: str, parts: Sequence[memoryview], *, replace: bool = False) -> bool:
        """Make `parts` visible under `name`, all at once; on an error nothing becomes visible.

        False when there is such an object already and `replace` is False. Media that cannot tell
        replace it: of several writers at the same moment the last one wins.
        """

    @abstractmethod
    def list(self, *, tidies: bool = False) -> Iterator[ListedObject]:
        """Every published object; if it `tidies`, what dead writers left is removed on the way."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object; one that is gone is no error."""

    def recycle(self, name: str) -> None:
        """As `remove`, for an undamaged object: its room may serve the next one."""
        self.remove(name)
