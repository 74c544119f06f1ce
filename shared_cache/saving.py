"""Saving: blocks on their way from the host tier to the shared tier, behind the engine's back.

An engine that waits for a store is slower than one without a cache. So saves go through a queue
that is bounded by bytes: when the store is slower than the engine, or dead, the newest blocks are
dropped and counted; they stay in host memory and serve this machine as long as they live there.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shared_cache.errors import StoreReadOnlyError
from shared_cache.faults import StoreGuard
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier
from shared_cache.store import BlockRun, BlockStore

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""How long closing waits for the store call that is under way."""


@dataclass(frozen=True, slots=True)
class SaveCounts:
    """Blocks by what became of them; all but `pending` only grow.

    A block that the store had already is neither saved nor dropped.
    """

    saved: int
    dropped: int
    pending: int


@dataclass(frozen=True, slots=True)
class _Save:
    lease: HostLease
    parent: BlockHash
    hashes: tuple[BlockHash, ...]


class SaveQueue:
    """Writes leased host blocks to the store in the background, one thread, in order."""

    def __init__(
        self, host: HostTier, store: BlockStore, guard: StoreGuard, max_bytes: int
    ) -> None:
        self._host = host
        self._store = store
        self._guard = guard
        self._max_blocks = max_bytes // store.namespace.layout.block_bytes
        self._changed = threading.Condition()
        self._queue: deque[_Save] = deque()
        self._num_saved = self._num_dropped = self._num_pending = 0
        self._accepts = True
        self._thread = threading.Thread(target=self._work, name="kvcommons-save", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> SaveCounts:
        """What became of the blocks so far."""
        with self._changed:
            return SaveCounts(self._num_saved, self._num_dropped, self._num_pending)

    def put(self, lease: HostLease, parent: BlockHash, hashes: Sequence[BlockHash]) -> None:
        """Take over `lease` and queue its blocks; returns at once.

        When the queue is nearly full the leading blocks are kept: the others are no use without.
        """
        with self._changed:
            room = self._max_blocks - self._num_pending if self._accepts else 0
            kept = tuple(hashes[: max(0, room)])
            self._num_dropped += len(hashes) - len(kept)
            if kept:
                self._num_pending += len(kept)
                self._queue.append(_Save(lease, parent, kept))
                self._changed.notify_all()
        if not kept:
            self._host.release(lease)

    def count_dropped(self, num_blocks: int) -> None:
        """Count blocks that could not even be queued."""
        with self._changed:
            self._num_dropped += num_blocks

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; False when time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_pending, timeout_s)

    def close(self) -> None:
        """Drop what is queued and wait a while for the write that is under way."""
        with self._changed:
            self._accepts = False
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for save in dropped:
            self._done(save, None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("a write to the shared tier is stuck and left behind")

    def _work(self) -> None:
        while (save := self._next()) is not None:
            num_written: int | None = None
            try:
                if self._guard.usable():
                    num_written = self._write(save)
            finally:
                self._done(save, num_written)

    def _next(self) -> _Save | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or not self._accepts)
            return self._queue.popleft() if self._queue else None

    def _write(self, save: _Save) -> int | None:
        """How many blocks were missing in the store and are there now; None when it failed."""
        slots = save.lease.slots[: len(save.hashes)]
        payloads = tuple(self._host.buffer(slot).toreadonly() for slot in slots)
        with self._guard.operation():
            try:
                return self._store.write(BlockRun(save.parent, save.hashes, payloads))
            except StoreReadOnlyError as error:
                logger.warning("the shared tier cannot be written to, saving ends here: %s", error)
                self._stop_accepting()
                raise
        return None

    def _stop_accepting(self) -> None:
        with self._changed:
            self._accepts = False

    def _done(self, save: _Save, num_written: int | None) -> None:
        self._host.release(save.lease)
        with self._changed:
            if num_written is None:
                self._num_dropped += len(save.hashes)
            else:
                self._num_saved += num_written
            self._num_pending -= len(save.hashes)
            self._changed.notify_all()
