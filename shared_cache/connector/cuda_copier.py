"""Copies between host slots and a pool on a GPU, on streams beside the engine's.

A copy that waits would hold up the engine's step, and one that is not ordered with the engine's
streams would read or write a block that a forward pass still uses. So these copies are ordered with
the engine's streams, and wait for none.
"""

import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from shared_cache.checksum import block_checksum
from shared_cache.connector.batched import BatchedCopies, MemoryCopy
from shared_cache.connector.copies import BlockLoad, BlockSave, OnDone, OnFailed, OnLoaded
from shared_cache.connector.pinned import PinnedMemory
from shared_cache.readers.memory import address_of

logger = logging.getLogger(__name__)


class CudaCopier:
    """Asynchronous copies on side streams.

    Host memory that was not prepared works too, several times slower: the driver then copies on
    the calling thread.

    Loads wait for the work before them on the engine's stream (their blocks may still be read by
    the previous pass), and the engine's next work waits for them, but for loads `beside` it. Saves
    wait for the forward pass; who overwrites blocks that are being saved waits for the saves. A
    thread waits for the saves' events, so that the engine's loop does not. It holds no copier:
    TensorRT-LLM tells nobody that an engine has ended, and a copier that is collected then ends it.
    Another thread waits for loads, where somebody wants to be told.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._base, self._block_bytes = pool.data_ptr(), pool.shape[1]
        self._load_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._beside_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._save_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._batches = BatchedCopies()
        self._reading: deque[tuple[torch.cuda.Event, frozenset[int]]] = deque()
        self._pinned = PinnedMemory(pool.device)
        self._saves: _Saves = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_finish_all,
            args=(self._saves, self._pinned),
            name="kvcommons-copied",
            daemon=True,
        )
        self._thread.start()
        self._loads: _Loads = queue.SimpleQueue()
        self._loaded_thread = threading.Thread(
            target=_tell_all,
            args=(self._loads, pool.device),
            name="kvcommons-loaded",
            daemon=True,
        )
        self._loaded_thread.start()
        self._end = weakref.finalize(self, _end_threads, self._saves, self._loads)
        self._end.atexit = False

    def load(self, loads: Sequence[BlockLoad], stream: Any) -> None:
        """See `BlockCopier.load`."""
        if loads:
            self._load_stream.wait_stream(stream)
            self._copy_in(loads, self._load_stream)
            stream.wait_stream(self._load_stream)

    def load_beside(
        self, loads: Sequence[BlockLoad], stream: Any, on_done: OnLoaded | None = None
    ) -> Callable[[], bool]:
        """See `BlockCopier.load_beside`."""
        self._beside_stream.wait_stream(stream)
        self._copy_in(loads, self._beside_stream)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._beside_stream)
        if on_done is not None:
            self._loads.put((done, on_done))
        return lambda: bool(done.query())  # type: ignore[no-untyped-call]

    def before_writes(self, blocks: Collection[int] | None, stream: Any) -> None:
        """See `BlockCopier.before_writes`."""
        while self._reading and self._reading[0][0].query():  # type: ignore[no-untyped-call]
            self._reading.popleft()
        for end, being_read in self._reading:
            if blocks is None or not being_read.isdisjoint(blocks):
                stream.wait_event(end)

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
        self._reading.append((end, frozenset(block for _, block, _ in copies)))
        self._saves.put(_RunningSave(start, end, copies, on_done, on_failed))

    def _copy_out(
        self, copies: Sequence[BlockSave], stream: Any
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        self._save_stream.wait_stream(stream)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(self._save_stream)
        size = self._block_bytes
        to = [address_of(buffer) for buffer, _, _ in copies]
        batch = [(a, self._row(block), size) for a, (_, block, _) in zip(to, copies, strict=True)]
        if not self._pinned.holds_all(to) or not self._batches.enqueue(batch, self._save_stream):
            with torch.cuda.stream(self._save_stream):
                for buffer, block, _ in copies:
                    host = torch.frombuffer(buffer, dtype=torch.uint8)
                    host.copy_(self._pool[block], non_blocking=True)
        end.record(self._save_stream)
        return start, end

    def _copy_in(self, loads: Sequence[BlockLoad], stream: torch.cuda.Stream) -> None:
        size = self._block_bytes
        batch: list[MemoryCopy] = []
        for load in loads:
            base = address_of(load.blocks.memory)
            rows = map(self._row, load.device_blocks)
            batch += [
                (row, base + start, size)
                for row, start in zip(rows, load.blocks.starts, strict=True)
            ]
        is_pinned = self._pinned.holds_all(source for _, source, _ in batch)
        if is_pinned and self._batches.enqueue(batch, stream):
            return
        with torch.cuda.stream(stream):
            for buffer, block in (pair for load in loads for pair in load.pairs()):
                host = torch.frombuffer(buffer, dtype=torch.uint8)
                self._pool[block].copy_(host, non_blocking=True)

    def _row(self, block: int) -> int:
        return self._base + block * self._block_bytes

    @property
    def prepare(self) -> Callable[[memoryview], None]:
        """See `BlockCopier.prepare`: pins memory, so that the device copies by itself."""
        return self._pinned.pin

    def close(self) -> None:
        """See `BlockCopier.close`."""
        self._end()
        self._thread.join()
        self._loaded_thread.join()


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


_Loads: TypeAlias = "queue.SimpleQueue[tuple[torch.cuda.Event, OnLoaded] | None]"

_Saves: TypeAlias = "queue.SimpleQueue[_RunningSave | None]"


def _end_threads(saves: _Saves, loads: _Loads) -> None:
    saves.put(None)
    loads.put(None)


def _tell_all(loads: _Loads, device: torch.device) -> None:
    """Tell who waits for a load that it is done, until there comes None."""
    torch.cuda.set_device(device)
    while (load := loads.get()) is not None:
        done, on_done = load
        with suppress(RuntimeError):  # who is told asks, and meets the error
            done.synchronize()
        try:
            on_done()
        except Exception:
            logger.exception("the end of a load could not be told")
        del load, done, on_done


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
