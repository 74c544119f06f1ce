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
from functools import partial

from shared_cache.errors import StoreFullError, StoreReadOnlyError, StoreUnavailableError
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier
from shared_cache.save_jobs import Save, copied_last
from shared_cache.stores.store import BlockRun
from shared_cache.threads import Crew, join_all, start_daemon
from shared_cache.tiers import CLOSE_TIMEOUT_S, Tier

logger = logging.getLogger(__name__)

MAX_THREADS = 4
"""Enough to hide the look-up before an upload; more only take bandwidth from reading."""

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
        self._queue: deque[Save] = deque()
        self._writing: set[BlockHash] = set()
        self._under_way: dict[threading.Thread, Save] = {}
        self._num_saved = self._num_dropped = self._num_pending = self._num_lost = 0
        self._accepts = True
        self._last_succeeded = True
        tier.writing.on_lost = self._lose
        self._crew = Crew(min(num_threads, MAX_THREADS), "kvcommons-save", self._work)
        self._watch = start_daemon(self._watch_store, "kvcommons-save-watch")

    @property
    def counts(self) -> SaveCounts:
        """What became of the blocks so far."""
        with self._changed:
            return SaveCounts(self._num_saved, self._num_dropped, self._num_pending)

    def put(
        self,
        lease: HostLease,
        parent: BlockHash,
        hashes: Sequence[BlockHash],
        tenant: bytes = b"",
    ) -> None:
        """Take over `lease`, which covers `hashes`, and queue them; waits for no store.

        `tenant` is who pays for them. When the queue is nearly full the leading blocks are kept:
        the others are no use without.
        """
        with self._changed:
            accepts = self._accepts and not self._tier.writing.refuses
            room = self._max_blocks - self._num_pending - self._num_lost if accepts else 0
            num_kept = max(0, min(room, len(hashes)))
            held = lease if num_kept == len(hashes) else self._host.lease_held(hashes[:num_kept])
            kept = tuple(hashes[: len(held.slots)])
            if kept:
                self._num_pending += len(kept)
                self._queue.append(Save((held,), parent, kept, tenant))
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

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that run still; they read the slots of what they write."""
        return self._crew.threads

    def stop(self) -> None:
        """Accept nothing from now on, and drop what is queued; waits for nothing."""
        with self._changed:
            self._accepts = False
        self._crew.dismiss()
        self._drop_queued()

    def close(self) -> None:
        """Drop what is queued and wait a while for the writes that are under way."""
        self.stop()
        if not join_all(self.threads, time.monotonic() + CLOSE_TIMEOUT_S):
            logger.warning("a write to %s is stuck and left behind", self._tier.url)

    def _drop_queued(self) -> None:
        with self._changed:
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for save in dropped:
            self._end(save, None)

    def _work(self) -> bool:
        """Wait until there is a save to write, and write it; False when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._accepts or self._ready() is not None)
            if not self._accepts:
                return False
        if not self._tier.writing.usable():
            self._pause()
        elif (save := self._take()) is not None:
            self._write(save)
        return True

    def _watch_store(self) -> None:
        """Ask for the store's health while something waits: all who write may be stuck in it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._accepts or self._num_pending)
            self._pause()
            if not self._accepts:
                return
            self._tier.writing.usable()

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._accepts, PAUSE_POLL_S)

    def _ready(self) -> int | None:
        """The place in the queue of the first save that may be written now."""
        return next(
            (i for i, save in enumerate(self._queue) if save.hashes[0] not in self._writing), None
        )

    def _take(self) -> Save | None:
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
            self._under_way[threading.current_thread()] = save
            return save

    def _write(self, save: Save) -> None:
        """Write one run, and count it, queue it again, or drop it."""
        num_written: int | None = None
        may_pass = is_refused = False
        run = save.run(self._host)
        with self._tier.writing.operation("write", partial(self._write_again, run)):
            try:
                num_written = self._tier.write(run)
            except (StoreUnavailableError, StoreFullError):
                may_pass = True
                raise
            except StoreReadOnlyError as error:
                is_refused = True
                logger.warning("%s cannot be written to for now: %s", self._tier.url, error)
                raise
        with self._changed:
            was_lost = self._under_way.pop(threading.current_thread(), None) is None
        if was_lost:
            self._come_back(save, num_written)
        elif not self._settled(save, num_written is not None, may_pass):
            self._end(save, num_written)
        if is_refused:
            self._drop_queued()

    def _write_again(self, run: BlockRun) -> None:
        """Write a copy of one block of a run whose write hangs: does the store write at all?

        The last one, as an object that began with the first would stand in the way of the run.
        """
        copied = copied_last(run)
        if copied is not None:
            self._tier.write(copied)

    def _lose(self, thread: threading.Thread) -> None:
        """Give up the write in `thread`; its slots stay leased as long as it may read them."""
        with self._changed:
            save = self._under_way.pop(thread, None)
            if save is None:
                return
            self._writing.discard(save.hashes[0])
            self._num_lost += len(save.hashes)
            self._num_dropped += len(save.hashes)
            self._num_pending -= len(save.hashes)
            self._changed.notify_all()
        self._crew.replace(thread)
        self._tell(save.hashes, is_stored=False)

    def _come_back(self, save: Save, num_written: int | None) -> None:
        """A write that was given up has ended after all."""
        if num_written is not None:
            self._tell(save.hashes, is_stored=True)
        for lease in save.leases:
            self._host.release(lease)
        with self._changed:
            self._num_lost -= len(save.hashes)

    def _settled(self, save: Save, succeeded: bool, may_pass: bool) -> bool:
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

    def _end(self, save: Save, num_written: int | None) -> None:
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
