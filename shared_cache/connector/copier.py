"""Copies between host slots and the engine's pool, one small class per kind of device.

A block is opaque bytes here: one row of the pool, one host slot. The CPU copier finishes each copy
before it returns; the CUDA copier orders its copies with the engine's streams and waits for none.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

logger = logging.getLogger(__name__)

BlockCopy = tuple[memoryview, int]
"""One host slot's bytes and the device block that belongs to it."""


class BlockCopier(Protocol):
    """Moves whole blocks. `stream` is a CUDA stream, or None on a CPU."""

    def load(self, copies: Sequence[BlockCopy], stream: Any) -> None:
        """Copy host -> device, done before anything that is enqueued on `stream` afterwards."""

    def save(self, copies: Sequence[BlockCopy], stream: Any, on_done: Callable[[], None]) -> None:
        """Copy device -> host after what is enqueued on `stream`; then call `on_done` once."""

    def close(self) -> None:
        """Wait until every save's `on_done` has returned, then let go of the pool."""


def make_copier(pool: torch.Tensor) -> BlockCopier:
    """The copier for `pool`, `[num_blocks, block_bytes]` of uint8."""
    return CudaCopier(pool) if pool.is_cuda else CpuCopier(pool)


class CpuCopier:
    """One memcpy per block on the calling thread.

    Through numpy: torch's `copy_` spreads a block over its threads, which is slower than one
    memcpy as soon as another thread computes.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._rows = pool.numpy()

    def load(self, copies: Sequence[BlockCopy], stream: Any) -> None:
        """See `BlockCopier.load`."""
        for buffer, block in copies:
            np.copyto(self._rows[block], np.frombuffer(buffer, np.uint8))

    def save(self, copies: Sequence[BlockCopy], stream: Any, on_done: Callable[[], None]) -> None:
        """See `BlockCopier.save`."""
        for buffer, block in copies:
            np.copyto(np.frombuffer(buffer, np.uint8), self._rows[block])
        on_done()

    def close(self) -> None:
        """See `BlockCopier.close`."""


class CudaCopier:
    """Asynchronous copies on side streams.

    Host memory that is not pinned works too, several times slower: the driver then copies on the
    calling thread.

    Loads wait for the work before them on the engine's stream (their blocks may still be read by
    the previous pass), and the engine's next work waits for them. Saves wait for the forward pass;
    the next turn waits for the saves, because it may overwrite blocks that are being saved. A
    thread waits for the saves' events, so that the engine's loop does not.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._load_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._save_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._last_save: torch.cuda.Event | None = None
        self._saves: queue.SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None]
        self._saves = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._finish, name="kvcommons-copied", daemon=True)
        self._thread.start()

    def load(self, copies: Sequence[BlockCopy], stream: Any) -> None:
        """See `BlockCopier.load`; also makes `stream` wait for the last turn's saves."""
        if self._last_save is not None:
            stream.wait_event(self._last_save)
            self._last_save = None
        if copies:
            self._load_stream.wait_stream(stream)
            with torch.cuda.stream(self._load_stream):
                for buffer, block in copies:
                    host = torch.frombuffer(buffer, dtype=torch.uint8)
                    self._pool[block].copy_(host, non_blocking=True)
            stream.wait_stream(self._load_stream)

    def save(self, copies: Sequence[BlockCopy], stream: Any, on_done: Callable[[], None]) -> None:
        """See `BlockCopier.save`."""
        self._save_stream.wait_stream(stream)
        with torch.cuda.stream(self._save_stream):
            for buffer, block in copies:
                host = torch.frombuffer(buffer, dtype=torch.uint8)
                host.copy_(self._pool[block], non_blocking=True)
            self._last_save = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._last_save.record(self._save_stream)
        self._saves.put((self._last_save, on_done))

    def close(self) -> None:
        """See `BlockCopier.close`."""
        self._saves.put(None)
        self._thread.join()

    def _finish(self) -> None:
        while (save := self._saves.get()) is not None:
            event, on_done = save
            try:
                event.synchronize()
                on_done()
            except Exception:
                logger.exception("a save from the device failed")
