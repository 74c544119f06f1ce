"""Copies between host slots and the engine's pool, one small class per kind of device.

A block is opaque bytes here: one row of the pool, one host slot. The CPU copier finishes each copy
before it returns; the CUDA copier orders its copies with the engine's streams and waits for none.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from shared_cache.checksum import block_checksum
from shared_cache.hashing import BlockHash
from shared_cache.parallel import run_all

logger = logging.getLogger(__name__)

BYTES_PER_PART = 8 << 20
"""Copied by one thread at a time: enough to be worth it, few enough to spread a turn's blocks."""

_FOR_ALL_DEVICES = 1
"""cudaHostRegisterPortable: threads that register may have another current device."""

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

    def prepare(self, memory: memoryview) -> None:
        """Make copies from and to this host memory fast; not called in the step."""

    def close(self) -> None:
        """Wait until every save's `on_done` has returned, then let go of the pool."""


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

    def prepare(self, memory: memoryview) -> None:
        """See `BlockCopier.prepare`: memory is memory to a CPU."""

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
    thread waits for the saves' events, so that the engine's loop does not.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._load_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._save_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._last_save: torch.cuda.Event | None = None
        # With the memory itself: were it unmapped, the driver would take whatever comes to lie at
        # that address for it, and copy old bytes.
        self._registered: list[tuple[int, memoryview]] = []
        self._saves: queue.SimpleQueue[_RunningSave | None] = queue.SimpleQueue()
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

    def prepare(self, memory: memoryview) -> None:
        """See `BlockCopier.prepare`: pins it, so that the device copies by itself.

        Raises `RuntimeError` when the driver refuses.
        """
        address = np.frombuffer(memory, np.uint8).ctypes.data
        error = _cuda_runtime().cudaHostRegister(address, memory.nbytes, _FOR_ALL_DEVICES)
        if int(error) != 0:
            raise RuntimeError(
                f"the driver does not pin {memory.nbytes} bytes of the host tier (CUDA error "
                f"{int(error)}): loads and saves are slower; raise the limit of locked memory"
            )
        self._registered.append((address, memory))

    def close(self) -> None:
        """See `BlockCopier.close`."""
        self._saves.put(None)
        self._thread.join()
        torch.cuda.synchronize(self._pool.device)
        while self._registered:
            address, _ = self._registered.pop()
            _cuda_runtime().cudaHostUnregister(address)

    def _finish(self) -> None:
        while (save := self._saves.get()) is not None:
            save.finish()


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


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
