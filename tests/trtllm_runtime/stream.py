"""The order of a device's work, and how far it lags behind the host.

A GPU executes what was put on its stream later. Under the overlap scheduler the host is up to one
forward pass ahead: a lease that ends when the host has planned a load, instead of when the device
has done it, gives its memory to somebody else under the copy. On a CPU that never shows, so this
stream can hold work back, for as long as TensorRT-LLM's loop would not wait for it.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from shared_cache.checksum import block_checksum
from shared_cache.connector.copies import (
    BlockCopy,
    BlockLoad,
    BlockSave,
    OnDone,
    OnFailed,
    OnLoaded,
)


class DeviceStream:
    """Work in order; `lags` holds it back until somebody waits for it."""

    def __init__(self, *, lags: bool = False) -> None:
        self._lags = lags
        self._work: deque[Callable[[], None]] = deque()
        self._num_put = self._num_done = 0

    def put(self, work: Callable[[], None]) -> int:
        """Enqueue; a ticket for `wait_for`. Without lag it is done on return."""
        self._work.append(work)
        self._num_put += 1
        if not self._lags:
            self.drain()
        return self._num_put

    def wait_for(self, ticket: int) -> None:
        """Run all work up to that of `ticket`, not what comes behind it."""
        while self._num_done < ticket:
            self._num_done += 1
            self._work.popleft()()

    def drain(self) -> None:
        """Run all work, as `torch.cuda.synchronize` does."""
        self.wait_for(self._num_put)

    def discard(self) -> None:
        """The process ends: nothing more is done."""
        self._work.clear()
        self._num_done = self._num_put


class LaggingCopier:
    """Stands for `CudaCopier`: its copies are work of the stream that it is given."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._rows = pool.numpy()
        self._streams: set[DeviceStream] = set()

    def load(self, loads: Sequence[BlockLoad], stream: Any) -> None:
        """See `BlockCopier.load`; host memory is read when the device gets there."""
        copies = [pair for load in loads for pair in load.pairs()]
        stream.put(lambda: self._load(copies))

    def load_beside(
        self, loads: Sequence[BlockLoad], stream: Any, on_done: OnLoaded | None = None
    ) -> Callable[[], bool]:
        """See `BlockCopier.load_beside`; done when the device gets there."""
        done: list[bool] = []
        self.load(loads, stream)
        stream.put(lambda: done.append(True))
        if on_done is not None:
            stream.put(on_done)
        return lambda: bool(done)

    def before_writes(self, blocks: Collection[int] | None, stream: Any) -> None:
        """See `BlockCopier.before_writes`: one stream does everything in order."""

    def save(
        self, copies: Sequence[BlockSave], stream: Any, on_done: OnDone, on_failed: OnFailed
    ) -> None:
        """See `BlockCopier.save`; the pool is read when the device gets there."""
        copies = list(copies)
        self._streams.add(stream)
        stream.put(lambda: on_done(0.0, self._save(copies)))

    def prepare(self, memory: memoryview) -> None:
        """See `BlockCopier.prepare`."""

    def close(self) -> None:
        """See `BlockCopier.close`."""
        for stream in self._streams:
            stream.drain()

    def _load(self, copies: Sequence[BlockCopy]) -> None:
        for buffer, block in copies:
            np.copyto(self._rows[block], np.frombuffer(buffer, np.uint8))

    def _save(self, copies: Sequence[BlockSave]) -> list[int]:
        checksums = []
        for buffer, block, name in copies:
            np.copyto(np.frombuffer(buffer, np.uint8), self._rows[block])
            checksums.append(block_checksum(name, buffer))
        return checksums
