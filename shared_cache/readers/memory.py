"""Which memory of this process a reader process knows, and by which name.

A store is given plain buffers. Where they lie in memory that others map, too, those may fill them.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared_cache.readers.messages import Row
from shared_cache.readers.process import ReaderProcess


@dataclass(frozen=True, slots=True)
class OutsideBuffers:
    """Buffers as `reader` knows them: each begins at its place in `memory`."""

    reader: ReaderProcess
    memory: int
    places: Sequence[int]

    def begin(self, file: int, rows: Sequence[Row]) -> Callable[[], bool]:
        """See `ReaderProcess.begin`."""
        return self.reader.begin(self.memory, file, rows)


class MappedMemory(Protocol):
    """Memory that a reader process maps, too."""

    def outside(self, addresses: Sequence[int], num_bytes: int) -> OutsideBuffers | None:
        """Buffers of so many bytes at these addresses; None unless all lie here."""


_mapped: "weakref.WeakSet[MappedMemory]" = weakref.WeakSet()
_lock = threading.Lock()


def add_mapped(memory: MappedMemory) -> None:
    """Let buffers be found that lie in this memory, as long as it lives."""
    with _lock:
        _mapped.add(memory)


def is_any_mapped() -> bool:
    """Whether any buffer can lie in such memory."""
    with _lock:
        return bool(_mapped)


def outside_buffers(buffers: Sequence[memoryview]) -> OutsideBuffers | None:
    """What a reader process knows of these buffers, which are equally long; None: nothing."""
    with _lock:
        known = list(_mapped)
    addresses = [address_of(buffer) for buffer in buffers] if known else []
    for memory in known:
        found = memory.outside(addresses, buffers[0].nbytes)
        if found is not None:
            return found
    return None


def address_of(buffer: memoryview) -> int:
    """Where a buffer begins in this process."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
