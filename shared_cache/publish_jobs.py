"""Publish jobs: what waits to be committed to the host tier, or to be stored, and how much it is.

The engine's step puts jobs here and must not wait; one thread takes them. Blocks that a step still
copies are counted too, as a flush has to wait for them before they are a job at all.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from shared_cache.host.interface import HostLease, NewRun

MERGED_BLOCKS = 256
"""Runs that continue each other are committed together, up to so many blocks."""


@dataclass(frozen=True, slots=True)
class Written:
    """Reserved slots that hold the blocks of `run`, the `first`th of its prompt and those behind.

    To be committed. It stands for `num_jobs` that were queued.
    """

    slots: tuple[int, ...]
    run: NewRun
    first: int
    num_jobs: int = 1

    def takes(self, other: "Written") -> bool:
        """Whether `other` continues this run, and both together are small enough."""
        ours, theirs = self.run, other.run
        return (
            theirs.parent == ours.hashes[-1]
            and len(self.slots) + len(other.slots) <= MERGED_BLOCKS
            and (theirs.tenant, theirs.is_stored) == (ours.tenant, ours.is_stored)
            and theirs.retention == ours.retention
            and bool(theirs.checksums) == bool(ours.checksums)
        )

    def merged(self, other: "Written") -> "Written":
        """Both runs as one."""
        ours, theirs = self.run, other.run
        run = replace(
            ours,
            hashes=ours.hashes + theirs.hashes,
            checksums=ours.checksums + theirs.checksums,
        )
        num_jobs = self.num_jobs + other.num_jobs
        return Written(self.slots + other.slots, run, self.first, num_jobs)


@dataclass(frozen=True, slots=True)
class Duty:
    """Blocks in host memory that the shared tier lacks; without a lease: only to be declined."""

    lease: HostLease | None
    run: NewRun
    first: int


@dataclass(frozen=True, slots=True)
class PublishCounts:
    """Blocks that wait to be published, and those that never were."""

    unpublished: int
    dropped: int


class PublishJobs:
    """The queue before the thread that publishes; thread-safe. Only `next` and `await_none` wait.

    Who puts a job must not wait either: the lock is never held for long.
    """

    def __init__(self, max_owed_blocks: int) -> None:
        """Duties beyond `max_owed_blocks` are taken without a lease, to be declined."""
        self._max_owed = max_owed_blocks
        self._changed = threading.Condition()
        self._jobs: deque[Written | Duty] = deque()
        self._num_jobs = 0
        self._num_being_copied = 0
        self._num_unpublished = 0
        self._num_owed = 0
        self._num_dropped = 0
        self._is_closed = False

    @property
    def counts(self) -> PublishCounts:
        """What waits, and what became nothing."""
        with self._changed:
            return PublishCounts(self._num_unpublished, self._num_dropped)

    def expect(self, num_blocks: int) -> None:
        """So many more blocks are being copied now, or, if negative, so many fewer."""
        with self._changed:
            self._num_being_copied += num_blocks
            self._changed.notify_all()

    def put(self, job: Written) -> bool:
        """Queue expected blocks; False, and they are dropped, once closed."""
        num_blocks = len(job.slots)
        with self._changed:
            self._num_being_copied -= num_blocks
            self._changed.notify_all()
            if self._is_closed:
                self._num_dropped += num_blocks
                return False
            self._add(job)
            self._num_unpublished += num_blocks
            return True

    def put_duty(self, run: NewRun, first: int, hold: Callable[[], HostLease] | None) -> bool:
        """Queue blocks that are to be stored; False, and nothing done, once closed.

        `hold` leases them, and is asked under the lock: what is leased is sure to be queued.
        """
        with self._changed:
            if self._is_closed:
                return False
            has_room = self._num_owed + len(run.hashes) <= self._max_owed
            self._add(Duty(hold() if has_room and hold is not None else None, run, first))
            self._num_owed += len(run.hashes)
            return True

    def drop(self, num_blocks: int) -> None:
        """Count blocks that were not published."""
        if not num_blocks:
            return
        with self._changed:
            self._num_dropped += num_blocks

    def next(self) -> Written | Duty | None:
        """The next job, with those behind it that continue its run: one question to the owner.

        Waits for one; None once closed. Call `done` with what this gives.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._jobs)
            if self._is_closed:
                return None
            job = self._jobs.popleft()
            while isinstance(job, Written) and self._jobs:
                following = self._jobs[0]
                if not isinstance(following, Written) or not job.takes(following):
                    break
                job = job.merged(following)
                self._jobs.popleft()
            return job

    def done(self, job: Written | Duty) -> None:
        """Nothing is left to do for this job."""
        with self._changed:
            if isinstance(job, Written):
                self._num_jobs -= job.num_jobs
                self._num_unpublished -= len(job.slots)
            else:
                self._num_jobs -= 1
                self._num_owed -= len(job.run.hashes)
            self._changed.notify_all()

    def await_none(self, timeout_s: float) -> bool:
        """Wait until nothing is queued, under way or being copied; False when time ran out."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._num_jobs and not self._num_being_copied, timeout_s
            )

    def close(self) -> list[Written | Duty]:
        """Take no more jobs; those that are left, for each of which `done` is to be called."""
        with self._changed:
            self._is_closed = True
            jobs = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        return jobs

    def _add(self, job: Written | Duty) -> None:
        """Queue a job; the lock is held."""
        self._jobs.append(job)
        self._num_jobs += 1
        self._changed.notify_all()
