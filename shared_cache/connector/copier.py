"""Copies between host slots and the engine's pool, one small class per kind of device.

A block is opaque bytes here: one row of the pool, one host slot. The CPU copier finishes each copy
before it returns; the CUDA copier orders its copies with the engine's streams and waits for none.
"""

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from shared_cache.checksum import block_checksum
from shared_cache.connector.pinned import PinnedMemory
from shared_cache.hashing import BlockHash
from shared_cache.parallel import run_all

logger = logging.getLogger(__name__)

BYTES_PER_PART = 8 << 20
"""Copied by one thread at a time: enough to be worth it, few enough to spread a turn's blocks."""

BlockCopy = tuple[memoryview, int]
"""One host slot's bytes and the device block that belongs to it."""

BlockSave = tuple[memoryview, int, BlockHash]
"""The same for a block to save, with its name."""

Copy = TypeVar("Copy")

OnFailed = Callable[[Exception], None]
"""Called instead when that failed, with the error."""

OnDone = Callable[[float, Sequence[int]], None]
"""Called when blocks are saved, with the seconds of copying and the blocks' checksums."""


class BlockCopier(Protocol):
    """Moves whole blocks. `stream` is a CUDA stream, or None on a CPU."""

    def load(self, copies: Sequence[BlockCopy], stream: Any) -> None:
        """Copy host -> device, done before anything that is enqueued on `stream` afterwards."""

    def save(
        self, copies: Sequence[BlockSave], stream: Any, on_done: OnDone, on_failed: OnFailed
    ) -> None:
        """Copy device -> host after what is enqueued on `stream`; then call `on_done` once.

        Instead `on_failed` is called once, perhaps by another thread, when nothing more will be
        written to the host; nothing is raised.
        """

    @property
    def prepare(self) -> Callable[[memoryview], None]:
        """Makes copies from and to host memory fast; not called in the step.

        It may outlive the copier, and keeps neither that nor the pool alive.
        """

    def close(self) -> None:
        """Wait until every save's `on_done` has returned; give back what was prepared."""


def make_copier(pool: torch.Tensor) -> BlockCopier:
    """The copier for `pool`, `[num_blocks, block_bytes]` of uint8."""
    return CudaCopier(pool) if pool.is_cuda else CpuCopier(pool)


class CpuCopier:
    """Plain copies, some blocks a thread.

    Through numpy: torch's `copy_` spreads every single block over its threads, which is slower than
    one memcpy as soon as another thread computes.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._rows = pool.numpy()
        self._block_bytes = pool.shape[1]

    def load(self, copies: Sequence[BlockCopy], stream: Any) -> None:
        """See `BlockCopier.load`."""
        run_all([partial(self._load, part) for part in _parts(copies, self._block_bytes)])

    def save(
        self, copies: Sequence[BlockSave], stream: Any, on_done: OnDone, on_failed: OnFailed
    ) -> None:
        """See `BlockCopier.save`; checksums are made while a block is in the CPU's cache."""
        start_s = time.perf_counter()
        try:
            checksums = run_all(
                [partial(self._save, part) for part in _parts(copies, self._block_bytes)]
            )
        except Exception as error:  # whatever it is, nothing is written any more
            on_failed(error)
            return
        on_done(time.perf_counter() - start_s, [one for part in checksums for one in part])

    @property
    def prepare(self) -> Callable[[memoryview], None]:
        """See `BlockCopier.prepare`: memory is memory to a CPU."""
        return _leave_as_it_is

    def close(self) -> None:
        """See `BlockCopier.close`."""

    def _load(self, copies: Sequence[BlockCopy]) -> None:
        for buffer, block in copies:
            np.copyto(self._rows[block], np.frombuffer(buffer, np.uint8))

    def _save(self, copies: Sequence[BlockSave]) -> list[int]:
        checksums = []
        for buffer, block, name in copies:
            row = self._rows[block]
            np.copyto(np.frombuffer(buffer, np.uint8), row)
            checksums.append(block_checksum(name, memoryview(row)))
        return checksums


def _leave_as_it_is(memory: memoryview) -> None:
    """Nothing to prepare."""


def _parts(copies: Sequence[Copy], block_bytes: int) -> list[Sequence[Copy]]:
    step = max(1, BYTES_PER_PART // block_bytes)
    return [copies[start : start + step] for start in range(0, len(copies), step)]


class CudaCopier:
    """Asynchronous copies on side streams.

    Host memory that was not prepared works too, several times slower: the driver then copies on
    the calling thread.

    Loads wait for the work before them on the engine's stream (their blocks may still be read by
    the previous pass), and the engine's next work waits for them. Saves wait for the forward pass;
    the next turn waits for the saves, because it may overwrite blocks that are being saved. A
    thread waits for the saves' events, so that the engine's loop does not. It holds no copier:
    TensorRT-LLM tells nobody that an engine has ended, and a copier that is collected then ends it.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._load_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._save_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._last_save: torch.cuda.Event | None = None
        self._pinned = PinnedMemory(pool.device)
        self._saves: _Saves = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_finish_all,
            args=(self._saves, self._pinned),
            name="kvcommons-copied",
            daemon=True,
        )
        self._thread.start()
        self._end = weakref.finalize(self, self._saves.put, None)
        self._end.atexit = False

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

    def save(
        self, copies: Sequence[BlockSave], stream: Any, on_done: OnDone, on_failed: OnFailed
    ) -> None:
        """See `BlockCopier.save`."""
        try:
            start, end = self._copy_out(copies, stream)
        except Exception as error:
            with suppress(RuntimeError):  # a broken device writes nothing any more
                self._save_stream.synchronize()
            on_failed(error)
            return
        self._last_save = end
        self._saves.put(_RunningSave(start, end, copies, on_done, on_failed))

    def _copy_out(
        self, copies: Sequence[BlockSave], stream: Any
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        self._save_stream.wait_stream(stream)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._save_stream):
            start.record(self._save_stream)
            for buffer, block, _ in copies:
                host = torch.frombuffer(buffer, dtype=torch.uint8)
                host.copy_(self._pool[block], non_blocking=True)
            end.record(self._save_stream)
        return start, end

    @property
    def prepare(self) -> Callable[[memoryview], None]:
        """See `BlockCopier.prepare`: pins memory, so that the device copies by itself."""
        return self._pinned.pin

    def close(self) -> None:
        """See `BlockCopier.close`."""
        self._end()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class _RunningSave:
    start: torch.cuda.Event
    end: torch.cuda.Event
    copies: Sequence[BlockSave]
    on_done: OnDone
    on_failed: OnFailed

    def finish(self) -> None:
        """Wait for the copies, then tell; an error of the device is told, not raised."""
        try:
            self.end.synchronize()
            seconds = self.start.elapsed_time(self.end) / 1000
        except RuntimeError as error:
            self.on_failed(error)
            return
        self.on_done(seconds, [block_checksum(name, buffer) for buffer, _, name in self.copies])


_Saves: TypeAlias = "queue.SimpleQueue[_RunningSave | None]"


def _finish_all(saves: _Saves, pinned: PinnedMemory) -> None:
    """Finish saves until there comes None; then nothing is copied any more."""
    torch.cuda.set_device(pinned.device)
    try:
        while _finish_next(saves):
            pass
    finally:
        pinned.release()


def _finish_next(saves: _Saves) -> bool:
    """A call of its own: while the next one is waited for, no save may keep its worker alive."""
    save = saves.get()
    if save is None:
        return False
    save.finish()
    return True
