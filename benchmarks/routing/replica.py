"""One modelled engine, as a fluid: prefills one after the other, decodes beside them.

Prefill is slowed by what is being decoded, a decode step by a prefill chunk beside it. A request
starts when it is the first, its loads are done and its KV memory is free. The engine loads or
computes again what it expects to be sooner.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

from benchmarks.routing.hardware import Hardware
from benchmarks.routing.memory import Blocks, DeviceMemory, LruTier, depth


@dataclass(slots=True, eq=False)
class Job:
    """One request on a replica; tokens by source are final once it has started.

    `private_blocks` hold the rest of the prompt and the output.
    """

    number: int
    num_tokens: int
    output_tokens: int
    blocks: Blocks
    private_blocks: int
    ready_s: float = 0.0
    work_s: float = 0.0
    device_tokens: int = 0
    host_tokens: int = 0
    shared_tokens: int = 0
    load_from: int = 0
    load_to: int = 0
    prefill_started_s: float = 0.0

    @property
    def computed_tokens(self) -> int:
        """Tokens that are not cached anywhere."""
        return self.num_tokens - self.device_tokens - self.host_tokens - self.shared_tokens


@dataclass(slots=True)
class Happenings:
    """What one turn of a replica brought."""

    evicted: list[int] = field(default_factory=list)
    first_tokens: list[Job] = field(default_factory=list)
    finished: list[Job] = field(default_factory=list)


class SimReplica:
    """One engine with its device memory; others may share its host tier, all share the store."""

    def __init__(self, replica_id: str, hardware: Hardware, host: LruTier, store: LruTier) -> None:
        self.replica_id = replica_id
        self.hardware = hardware
        self._block = hardware.tokens_per_block
        self.device = DeviceMemory(hardware.device_tokens // self._block)
        self.host = host
        self.store = store
        self.version = 0
        self.busy_s = 0.0
        self._queue: deque[Job] = deque()
        self._in_flight: dict[int, int] = {}
        self._prefill: Job | None = None
        self._work_left_s = 0.0
        self._turn_s = hardware.chunk_s
        self._queued_work_s = 0.0
        self._decodes: list[tuple[float, int, Job]] = []
        self._step = 0.0
        self._kv_tokens = 0.0
        self._now_s = 0.0
        self._host_free_s = self._store_free_s = 0.0

    @property
    def jobs(self) -> list[Job]:
        """All requests that are here."""
        running = [job for _, _, job in self._decodes]
        return [*running, *([self._prefill] if self._prefill else []), *self._queue]

    @property
    def num_queued(self) -> int:
        """Requests without a first token."""
        return len(self._queue) + (self._prefill is not None)

    @property
    def queued_work_s(self) -> float:
        """Prefill that is not done."""
        return self._queued_work_s + self._work_left_s

    def arrive(self, job: Job, now_s: float, store_link_free_s: float = 0.0) -> None:
        """Take a request; its loads begin at once. The store's own link is free from then on."""
        self._advance(now_s)
        self._plan_loads(job, now_s, store_link_free_s)
        for block in job.blocks:
            self._in_flight[block] = self._in_flight.get(block, 0) + 1
        self._queue.append(job)
        self._queued_work_s += job.work_s

    def turn(self, now_s: float) -> Happenings:
        """Bring the replica to `now_s`: what has started, got its first token, or ended."""
        self._advance(now_s)
        happened = Happenings()
        if self._prefill is not None and self._work_left_s <= 1e-9:
            happened.first_tokens.append(self._end_prefill())
        while self._decodes and self._decodes[0][0] <= self._step + 1e-6:
            job = heapq.heappop(self._decodes)[2]
            self.device.unpin(job.blocks, job.private_blocks)
            self._kv_tokens -= job.num_tokens + job.output_tokens
            happened.finished.append(job)
        if not self._decodes:
            self._kv_tokens = 0.0
        self._start(happened)
        return happened

    def next_event_s(self) -> float | None:
        """When `turn` has something to do; None when the replica is idle."""
        times = []
        if self._prefill is not None:
            times.append(self._now_s + self._work_left_s * self._slowdown())
        elif self._queue and self._queue[0].ready_s > self._now_s:
            times.append(self._queue[0].ready_s)
        if self._decodes:
            steps = max(0.0, self._decodes[0][0] - self._step)
            times.append(self._now_s + steps * self._step_s())
        return min(times) if times else None

    def _slowdown(self) -> float:
        return 1 + self.hardware.kv_read_s * self._kv_tokens / self._turn_s

    def _step_s(self) -> float:
        hardware = self.hardware
        base_s = hardware.step_s if self._prefill is None else self._turn_s
        return base_s + hardware.kv_read_s * self._kv_tokens

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._now_s
        self._now_s = now_s
        if passed_s <= 0:
            return
        if self._decodes:
            steps = passed_s / self._step_s()
            if self._prefill is not None:
                self._work_left_s -= passed_s / self._slowdown()
                self.busy_s += passed_s
            self._step += steps
            self._kv_tokens += steps * len(self._decodes)
        elif self._prefill is not None:
            self._work_left_s -= passed_s
            self.busy_s += passed_s

    def _plan_loads(self, job: Job, now_s: float, store_link_free_s: float) -> None:
        """Load or compute again, whichever is sooner with what is before it."""
        hardware = self.hardware
        on_device = self._known_depth(job.blocks)
        on_host = max(on_device, self.host.depth(job.blocks))
        in_store = max(on_host, self.store.depth(job.blocks))
        wait_s = (self._queued_work_s + self._work_left_s) * self._slowdown()
        self.device.touch(job.blocks[:on_device])
        best_s = float("inf")
        for host, stored in dict.fromkeys(((on_host, in_store), (on_host, 0), (on_device, 0))):
            host_tokens = (host - on_device) * self._block
            store_tokens = max(0, stored - host) * self._block
            host_s = max(now_s, self._host_free_s) + hardware.host_load_s(host_tokens)
            store_s = max(now_s, self._store_free_s, store_link_free_s)
            store_s += hardware.store_load_s(store_tokens)
            ready_s = max(host_s if host_tokens else now_s, store_s if store_tokens else now_s)
            cached = max(host, stored) * self._block
            work_s = hardware.prefill_s(job.num_tokens - cached, cached)
            end_s = max(now_s + wait_s, ready_s) + work_s * self._slowdown()
            if end_s < best_s:
                best_s = end_s
                job.ready_s, job.work_s = ready_s, work_s
                job.host_tokens, job.shared_tokens = host_tokens, store_tokens
        job.load_from = on_device
        job.load_to = on_device + (job.host_tokens + job.shared_tokens) // self._block
        if job.host_tokens:
            self._host_free_s = max(now_s, self._host_free_s)
            self._host_free_s += hardware.host_load_s(job.host_tokens)
        if job.shared_tokens:
            self._store_free_s = max(now_s, self._store_free_s, store_link_free_s)
            self._store_free_s += hardware.store_load_s(job.shared_tokens)

    def _known_depth(self, blocks: Blocks) -> int:
        """Leading blocks on the device, or about to be when what is queued has run."""
        first = self.device.depth(blocks)
        return first + depth(self._in_flight, blocks[first:])

    def _start(self, happened: Happenings) -> None:
        if self._prefill is not None or not self._queue:
            return
        job = self._queue[0]
        if job.ready_s > self._now_s + 1e-9:
            return
        if not self.device.can_pin(job.blocks, job.private_blocks):
            return
        self._queue.popleft()
        self._queued_work_s = max(0.0, self._queued_work_s - job.work_s)
        self._settle_sources(job)
        happened.evicted.extend(self.device.pin(job.blocks, job.private_blocks))
        self._prefill = job
        job.prefill_started_s = self._now_s
        computed = job.computed_tokens
        self._work_left_s = self.hardware.prefill_s(computed, job.num_tokens - computed)
        self._turn_s = self.hardware.turn_s(computed, self._work_left_s)

    def _settle_sources(self, job: Job) -> None:
        """What is on the device now decides what the loads were good for."""
        on_device = self.device.depth(job.blocks)
        job.device_tokens = on_device * self._block
        if on_device >= job.load_to or on_device < job.load_from:
            job.host_tokens = job.shared_tokens = 0
            return
        late = (on_device - job.load_from) * self._block
        job.shared_tokens -= max(0, late - job.host_tokens)
        job.host_tokens = max(0, job.host_tokens - late)

    def _end_prefill(self) -> Job:
        job, self._prefill = self._prefill, None
        assert job is not None
        self._work_left_s = 0.0
        for block in job.blocks:
            count = self._in_flight[block] - 1
            if count:
                self._in_flight[block] = count
            else:
                del self._in_flight[block]
        self._kv_tokens += job.num_tokens + 1
        steps = max(0, job.output_tokens - 1)
        heapq.heappush(self._decodes, (self._step + steps, job.number, job))
        return job
