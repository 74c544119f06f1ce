"""Publishing: what becomes of new blocks once the engine's step has copied them.

Committing a run takes its checksums and, where the host tier is shared by the processes of a node,
a question to its owner; both are too slow for the step. Here one thread does it, and hands what
nobody has stored yet to the queues that write. It also answers for blocks that a look-up found to
be missing in the shared tier (used a second time, or dropped by somebody under pressure).
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shared_cache.cost import CostGate
from shared_cache.faults import FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier, NewRun
from shared_cache.saving import SaveCounts
from shared_cache.sinks import consecutive, make_sinks, part
from shared_cache.tiers import Tier, TieredStore, TierStats

MERGED_BLOCKS = 256
"""Runs that continue each other are committed together, up to so many blocks."""

NEAR_FLUSH_S = 1.0
"""How long a flush waits for tiers whose blocks can be had from the shared tier too."""

DECLINE_INTERVAL_S = 60.0
"""How often a process that may not write to the shared tier gives back the duty to do so."""


@dataclass(frozen=True, slots=True)
class _Written:
    """Reserved slots that hold the blocks of `run`, the `first`th of its prompt and those behind.

    To be committed. It stands for `num_jobs` that were queued.
    """

    slots: tuple[int, ...]
    run: NewRun
    first: int
    num_jobs: int = 1

    def takes(self, other: "_Written") -> bool:
        """Whether `other` continues this run, and both together are small enough."""
        ours, theirs = self.run, other.run
        return (
            theirs.parent == ours.hashes[-1]
            and len(self.slots) + len(other.slots) <= MERGED_BLOCKS
            and (theirs.tenant, theirs.is_stored) == (ours.tenant, ours.is_stored)
            and theirs.retention == ours.retention
            and bool(theirs.checksums) == bool(ours.checksums)
        )

    def merged(self, other: "_Written") -> "_Written":
        ours, theirs = self.run, other.run
        run = replace(
            ours,
            hashes=ours.hashes + theirs.hashes,
            checksums=ours.checksums + theirs.checksums,
        )
        num_jobs = self.num_jobs + other.num_jobs
        return _Written(self.slots + other.slots, run, self.first, num_jobs)


@dataclass(frozen=True, slots=True)
class _Duty:
    """Blocks in host memory that the shared tier lacks; without a lease: only to be declined."""

    lease: HostLease | None
    run: NewRun
    first: int


class Publisher:
    """Publishes what was written into host slots, and has it stored; for any number of threads.

    Blocks that were not published, or not written to the shared tier, are counted as dropped.
    """

    def __init__(
        self,
        host: HostTier,
        tiers: TieredStore,
        max_blocks: int,
        num_threads: int,
        faults: FaultLog,
        gate: CostGate | None = None,
    ) -> None:
        """At most `max_blocks` wait to be written, and as many to be handed to the queues."""
        self._host = host
        self._tiers = tiers
        self._faults = faults
        self._max_blocks = max_blocks
        self._sinks = {
            sink.tier: sink for sink in make_sinks(host, tiers, max_blocks, num_threads, gate)
        }
        self._shared = None if tiers.shared is None else self._sinks.get(tiers.shared)
        self._changed = threading.Condition()
        self._jobs: deque[_Written | _Duty] = deque()
        self._num_jobs = 0
        self._num_being_copied = 0
        self._num_unpublished = 0
        self._num_owed = 0
        self._num_dropped = 0
        self._declined: list[BlockHash] = []  # this and the next: the thread's own
        self._next_decline_s = float("-inf")
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="kvcommons-publish", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> SaveCounts:
        """What became of new blocks, as far as the shared tier is concerned."""
        saved = self._shared.queue.counts if self._shared else SaveCounts(0, 0, 0)
        with self._changed:
            pending = self._num_unpublished if self._shared else 0
            return SaveCounts(
                saved.saved, saved.dropped + self._num_dropped, saved.pending + pending
            )

    def expect(self, num_blocks: int) -> None:
        """So many blocks are being copied now, and will be published or given back."""
        with self._changed:
            self._num_being_copied += num_blocks

    def give_back(self, slots: Sequence[int]) -> None:
        """Slots that were expected hold nothing, and nobody writes to them any more."""
        with self._changed:
            self._num_being_copied -= len(slots)
            self._changed.notify_all()
        self._host.cancel(slots)

    def publish(self, slots: Sequence[int], run: NewRun, first: int) -> None:
        """Take over expected slots, written now; returns at once: *in the step*."""
        with self._changed:
            self._num_being_copied -= len(slots)
            self._changed.notify_all()
            if not self._is_closed:
                self._add(_Written(tuple(slots), run, first))
                self._num_unpublished += len(slots)
                return
            self._num_dropped += len(slots)
        self._host.cancel(slots)

    def owe(self, lease: HostLease, run: NewRun, first: int) -> None:
        """Have the blocks that `lease.to_store` names written; `lease` stays the caller's.

        Returns at once. Under pressure they are declined: a later look-up will name them again.
        """
        for begin, end in consecutive(lease.to_store):
            owed = part(run, begin, end)
            with self._changed:
                if self._is_closed:
                    return
                has_room = self._num_owed + len(owed.hashes) <= self._max_blocks
                held = self._host.lease_held(owed.hashes) if has_room and self._shared else None
                self._add(_Duty(held, owed, first + begin))
                self._num_owed += len(owed.hashes)

    def promote(self, tier: Tier, lease: HostLease, run: NewRun, first: int) -> None:
        """Blocks came from `tier`: offer them to the nearer ones; `lease` stays the caller's."""
        for nearer in self._tiers.before(tier):
            sink = self._sinks.get(nearer)
            if sink is not None:
                sink.offer(part(run, 0, len(lease.slots)), first)
        if lease.to_store:
            self.owe(lease, run, first)

    def await_published(self, timeout_s: float) -> bool:
        """Wait until all is in the host tier and handed to the queues; False when time ran out.

        Blocks that are still being copied off the device are waited for too.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._num_jobs and not self._num_being_copied, timeout_s
            )

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is published and in the shared tier, or dropped; False: out of time."""
        deadline_s = time.monotonic() + timeout_s
        if not self.await_published(timeout_s):
            return False
        left_s = max(0.0, deadline_s - time.monotonic())
        is_stored = self._shared is None or self._shared.queue.flush(left_s)
        for sink in self._sinks.values():
            if sink is not self._shared:
                sink.queue.flush(min(NEAR_FLUSH_S, max(0.0, deadline_s - time.monotonic())))
        return is_stored

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that run still; they use the slots of what they publish or write."""
        writing = [thread for sink in self._sinks.values() for thread in sink.queue.threads]
        return [*writing, self._thread] if self._thread.is_alive() else writing

    def close(self) -> None:
        """Drop what is not published or written yet; waits for nothing."""
        with self._changed:
            self._is_closed = True
            jobs = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in jobs:
            self._drop(job)
            self._done(job)
        for sink in self._sinks.values():
            sink.queue.stop()

    def tier_stats(self) -> tuple[TierStats, ...]:
        """The counters of every tier."""
        return tuple(
            self._sinks[tier].stats() if tier in self._sinks else tier.stats()
            for tier in self._tiers.tiers
        )

    def _add(self, job: _Written | _Duty) -> None:
        """Queue a job; the lock is held."""
        self._jobs.append(job)
        self._num_jobs += 1
        self._changed.notify_all()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                with self._faults.caught("publishing new blocks"):
                    self._handle(job)
            finally:
                self._done(job)

    def _next(self) -> _Written | _Duty | None:
        """The next job, with those behind it that continue its run: one question to the owner."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._jobs)
            if self._is_closed:
                return None
            job = self._jobs.popleft()
            while isinstance(job, _Written) and self._jobs:
                following = self._jobs[0]
                if not isinstance(following, _Written) or not job.takes(following):
                    break
                job = job.merged(following)
                self._jobs.popleft()
            return job

    def _done(self, job: _Written | _Duty) -> None:
        with self._changed:
            if isinstance(job, _Written):
                self._num_jobs -= job.num_jobs
                self._num_unpublished -= len(job.slots)
            else:
                self._num_jobs -= 1
                self._num_owed -= len(job.run.hashes)
            self._changed.notify_all()

    def _handle(self, job: _Written | _Duty) -> None:
        if isinstance(job, _Written):
            self._commit(job)
        elif job.lease is None:
            self._decline(job.run.hashes)
        else:
            self._store(job.lease, job.run, job.first)

    def _commit(self, job: _Written) -> None:
        try:
            lease = self._host.commit(job.slots, job.run)
        except BaseException:
            self._drop(job)  # a commit that fails has published nothing
            raise
        try:
            num_lost = len(job.slots) - len(lease.slots)
            with self._changed:
                self._num_dropped += num_lost
            self._offer_to_near(lease, job)
            for begin, end in consecutive(lease.to_store):
                held = self._host.lease_held(job.run.hashes[begin:end])
                self._store(held, part(job.run, begin, end), job.first + begin)
        finally:
            self._host.release(lease)

    def _offer_to_near(self, lease: HostLease, job: _Written) -> None:
        """Tiers nearer than the shared one get what is new on this node, stored or not."""
        new = tuple(i for i, slot in enumerate(lease.slots) if slot == job.slots[i])
        for sink in self._sinks.values():
            if not sink.tier.is_shared and sink.tier.admission != "second_use":
                for begin, end in consecutive(new):
                    sink.offer(part(job.run, begin, end), job.first + begin)

    def _store(self, lease: HostLease, run: NewRun, first: int) -> None:
        """Write leased blocks to the shared tier, or decline it; takes over `lease`."""
        sink, num_blocks = self._shared, len(lease.slots)
        if sink is None or not num_blocks or not sink.wants(first, first + num_blocks):
            self._host.release(lease)
            self._decline(run.hashes)
            return
        sink.queue.put(lease, run.parent, run.hashes[:num_blocks])
        if num_blocks < len(run.hashes):
            self._host.stored(run.hashes[num_blocks:], is_stored=False)

    def _decline(self, hashes: Sequence[BlockHash]) -> None:
        """Give duties back. Who may write nothing does so seldom: it would be named them at once.

        Other processes of this machine may be able to write, so they are not kept for ever.
        """
        self._declined += hashes
        if self._shared is None and time.monotonic() < self._next_decline_s:
            return
        self._next_decline_s = time.monotonic() + DECLINE_INTERVAL_S
        declined, self._declined = self._declined, []
        self._host.stored(tuple(declined), is_stored=False)

    def _drop(self, job: _Written | _Duty) -> None:
        if isinstance(job, _Written):
            self._host.cancel(job.slots)
            with self._changed:
                self._num_dropped += len(job.slots)
        elif job.lease is not None:
            self._host.release(job.lease)
