"""Saving: blocks on their way from the host tier to a tier behind it, behind the engine's back.

An engine that waits for a store is slower than one without a cache. So saves go through a queue
that is bounded by bytes: when the store is slower than the engine, or dead, the newest blocks are
dropped and counted; they stay in host memory and serve this machine as long as they live there.
A save outlives an outage of the store in the queue: dropped there, the hottest prefix would reach
the other replicas only when somebody on this machine asks for it again.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shared_cache.errors import StoreFullError, StoreReadOnlyError, StoreUnavailableError
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier
from shared_cache.store import BlockRun
from shared_cache.tiers import CLOSE_TIMEOUT_S, Tier

logger = logging.getLogger(__name__)

MAX_THREADS = 4
"""Enough to hide the look-up before an upload; more only take bandwidth from reading."""

MERGED_BLOCKS = 64
"""Queued runs that continue each other become one object of up to so many blocks."""

MAX_SETBACKS = 5
"""A run that fails so often while others succeed is at fault itself, and dropped."""

PAUSE_POLL_S = 0.25
"""How often a thread asks whether the store is usable again, while there is something to save."""

Answer = Callable[[Sequence[BlockHash], bool], None]
"""Told what became of blocks: the store has them now, or they were given up."""


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
    """A run whose blocks lie in the slots of `leases`, in order."""

    leases: tuple[HostLease, ...]
    parent: BlockHash
    hashes: tuple[BlockHash, ...]
    num_setbacks: int = 0

    def takes(self, other: "_Save") -> bool:
        """Whether `other` continues this run, and both together are small enough."""
        num_blocks = len(self.hashes) + len(other.hashes)
        return other.parent == self.hashes[-1] and num_blocks <= MERGED_BLOCKS

    def merged(self, other: "_Save") -> "_Save":
        return _Save(
            self.leases + other.leases,
            self.parent,
            self.hashes + other.hashes,
            max(self.num_setbacks, other.num_setbacks),
        )


class SaveQueue:
    """Writes leased host blocks to one tier in the background.

    Several threads write, each a run of its own, in any order: a run that is stored before the one
    in front of it is found as soon as that one is there, and never by a wrong name. Only runs with
    the same first block wait for each other, as they would replace each other in an object store.
    The queue holds leases on at most `max_blocks`, so that a dead store cannot pin the host tier.
    `answer` is told what became of every block, and may take its time.
    """

    def __init__(
        self,
        host: HostTier,
        tier: Tier,
        max_blocks: int,
        num_threads: int = MAX_THREADS,
        answer: Answer | None = None,
    ) -> None:
        """Start `num_threads` threads, but at most `MAX_THREADS`."""
        self._host = host
        self._tier = tier
        self._max_blocks = max_blocks
        self._answer = answer
        self._changed = threading.Condition()
        self._queue: deque[_Save] = deque()
        self._writing: set[BlockHash] = set()
        self._num_saved = self._num_dropped = self._num_pending = 0
        self._accepts = True
        self._last_succeeded = True
        self._threads = [
            threading.Thread(target=self._work, name=f"kvcommons-save-{index}", daemon=True)
            for index in range(min(num_threads, MAX_THREADS))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def counts(self) -> SaveCounts:
        """What became of the blocks so far."""
        with self._changed:
            return SaveCounts(self._num_saved, self._num_dropped, self._num_pending)

    def put(self, lease: HostLease, parent: BlockHash, hashes: Sequence[BlockHash]) -> None:
        """Take over `lease`, which covers `hashes`, and queue them; waits for no store.

        When the queue is nearly full the leading blocks are kept: the others are no use without.
        """
        with self._changed:
            room = self._max_blocks - self._num_pending if self._accepts else 0
            num_kept = max(0, min(room, len(hashes)))
            held = lease if num_kept == len(hashes) else self._host.lease_held(hashes[:num_kept])
            kept = tuple(hashes[: len(held.slots)])
            if kept:
                self._num_pending += len(kept)
                self._queue.append(_Save((held,), parent, kept))
                self._changed.notify_all()
            self._num_dropped += len(hashes) - len(kept)
        if held is not lease:
            self._host.release(lease)
        if len(kept) < len(hashes):
            self._tell(hashes[len(kept) :], is_stored=False)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; False when time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_pending, timeout_s)

    def close(self) -> None:
        """Drop what is queued and wait a while for the writes that are under way."""
        self._stop()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.warning("a write to %s is stuck and left behind", self._tier.url)

    def _stop(self) -> None:
        """Accept nothing from now on, and drop what is queued."""
        with self._changed:
            self._accepts = False
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for save in dropped:
            self._end(save, None)

    def _work(self) -> None:
        while self._wait_for_ready():
            if not self._tier.writing.usable():
                self._pause()
            elif (save := self._take()) is not None:
                self._write(save)

    def _wait_for_ready(self) -> bool:
        """Wait until there is a save to write; False when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._accepts or self._ready() is not None)
            return self._accepts

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._accepts, PAUSE_POLL_S)

    def _ready(self) -> int | None:
        """The place in the queue of the first save that may be written now."""
        return next(
            (i for i, save in enumerate(self._queue) if save.hashes[0] not in self._writing), None
        )

    def _take(self) -> _Save | None:
        """The next save, with those behind it in the queue that continue its run."""
        with self._changed:
            index = self._ready()
            if index is None:
                return None
            save = self._queue[index]
            del self._queue[index]
            while index < len(self._queue) and save.takes(self._queue[index]):
                save = save.merged(self._queue[index])
                del self._queue[index]
            self._writing.add(save.hashes[0])
            return save

    def _write(self, save: _Save) -> None:
        """Write one run, and count it, queue it again, or drop it."""
        num_written: int | None = None
        may_pass = False
        with self._tier.writing.operation():
            try:
                num_written = self._tier.write(self._run(save))
            except (StoreUnavailableError, StoreFullError):
                may_pass = True
                raise
            except StoreReadOnlyError as error:
                logger.warning("%s cannot be written to, saving ends: %s", self._tier.url, error)
                self._stop()
                raise
        if not self._settled(save, num_written is not None, may_pass):
            self._end(save, num_written)

    def _run(self, save: _Save) -> BlockRun:
        slots = [slot for lease in save.leases for slot in lease.slots]
        return BlockRun(
            save.parent,
            save.hashes,
            payloads=tuple(self._host.buffer(slot).toreadonly() for slot in slots),
            checksums=tuple(self._host.checksum(slot) for slot in slots),
        )

    def _settled(self, save: _Save, succeeded: bool, may_pass: bool) -> bool:
        """Note how a write ended; True when the save waits in the queue for another try.

        It goes to the end: a run that cannot be stored must not keep the others waiting. Its blocks
        never ceased to count as pending, so there is room for it.
        """
        with self._changed:
            self._writing.discard(save.hashes[0])
            num_setbacks = save.num_setbacks + self._last_succeeded
            self._last_succeeded = succeeded
            tries_again = may_pass and self._accepts and num_setbacks < MAX_SETBACKS
            if tries_again:
                self._queue.append(replace(save, num_setbacks=num_setbacks))
            self._changed.notify_all()
            return tries_again

    def _end(self, save: _Save, num_written: int | None) -> None:
        """Give the leases back and count the blocks: missing before and stored now, or dropped."""
        self._tell(save.hashes, is_stored=num_written is not None)
        for lease in save.leases:
            self._host.release(lease)
        with self._changed:
            if num_written is None:
                self._num_dropped += len(save.hashes)
            else:
                self._num_saved += num_written
            self._num_pending -= len(save.hashes)
            self._changed.notify_all()

    def _tell(self, hashes: Sequence[BlockHash], *, is_stored: bool) -> None:
        if self._answer is not None:
            self._answer(hashes, is_stored)
