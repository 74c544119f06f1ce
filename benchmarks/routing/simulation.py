"""One run: arrivals, a router with its real policy, cost and bookings, modelled replicas.

Everything happens at times that follow from the seed, so two runs are the same to the byte.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from actors.receipt import Receipt
from actors.routing import Booking, Bookings, MeasuredSpeeds, PromptView, Selector
from benchmarks.routing.autoscaler import Autoscaler
from benchmarks.routing.knowledge import Beliefs
from benchmarks.routing.memory import LruTier
from benchmarks.routing.replica import Job, SimReplica
from benchmarks.routing.scenario import Outcome, Scenario, Served
from benchmarks.routing.workload import Arrival


class Simulation:
    """Runs one scenario over one list of arrivals."""

    def __init__(self, scenario: Scenario, arrivals: Sequence[Arrival]) -> None:
        self._scenario = scenario
        self._served = [Served(one) for one in arrivals]
        hardware = scenario.hardware
        block = hardware.tokens_per_block
        store_blocks = hardware.store_tokens * scenario.num_replicas // block
        self._store = LruTier(store_blocks)
        self._store_free_s = 0.0
        self._newest_host: tuple[list[SimReplica], LruTier] = ([], LruTier(0))
        rng = random.Random(f"router {scenario.seed}")
        self._selector = Selector(
            scenario.policy,
            Bookings(tokens_per_key=block),
            MeasuredSpeeds(scenario.speeds),
            scenario.weights,
            rng,
        )
        events = random.Random(f"events {scenario.seed}")
        knowledge = self._selector.policy.knowledge
        self._beliefs = Beliefs(knowledge, scenario.faults, events, block)
        self._hosts: dict[str, list[SimReplica]] = {}
        self._replicas: dict[str, SimReplica] = {}
        self._bookings: dict[int, Booking] = {}
        self._heap: list[tuple[float, int, str, int]] = []
        self._num_events = self._num_named = 0
        self._dead: set[str] = set()
        self._draining: set[str] = set()
        self._all: dict[str, SimReplica] = {}
        self._samples: list[tuple[float, float]] = []
        self._num_starting = 0
        self._followers: defaultdict[int, list[int]] = defaultdict(list)
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []

    def run(self) -> Outcome:
        """Play everything to its end."""
        scenario = self._scenario
        for _ in range(scenario.num_replicas):
            self._start_replica()
        for at_s, name in scenario.deaths:
            self._plan(at_s, partial(self._die, name))
        self._plan(scenario.warm_up_s, self._sample)
        if scenario.autoscale is not None:
            scaler = Autoscaler(scenario.autoscale)
            self._plan(scenario.autoscale.interval_s, partial(self._autoscale, scaler))
        for number, served in enumerate(self._served):
            if served.arrival.after is not None:
                self._followers[served.arrival.after].append(number)
        for number, served in enumerate(self._served):
            if served.arrival.after is not None:
                continue
            at_s = served.arrival.at_s
            while self._agenda[0][0] <= at_s:
                planned_s, _, act = heapq.heappop(self._agenda)
                self._play_until(planned_s)
                act(planned_s)
            self._play_until(at_s)
            self._arrive(number, at_s)
        last_s = self._served[-1].arrival.at_s if self._served else 0.0
        busy_s = {name: one.busy_s for name, one in self._all.items()}
        self._play_until(float("inf"))
        return self._outcome(busy_s, last_s)

    def _outcome(self, busy_s: dict[str, float], last_s: float) -> Outcome:
        count = max(1, len(self._samples))
        return Outcome(
            scenario=self._scenario,
            served=self._served,
            busy_s=busy_s,
            end_s=last_s,
            speeds=self._selector.measured.speeds,
            pinned_share=sum(one for one, _ in self._samples) / count,
            queue_imbalance=sum(one for _, one in self._samples) / count,
        )

    def _plan(self, at_s: float, act: Callable[[float], None]) -> None:
        """Call `act` at that time, after what replicas do until then."""
        self._num_events += 1
        heapq.heappush(self._agenda, (at_s, self._num_events, act))

    def _sample(self, now_s: float) -> None:
        """Pinned memory, and how far the longest queue is above the mean; every second."""
        self._plan(now_s + 1.0, self._sample)
        replicas = list(self._replicas.values())
        if not replicas:
            return
        pinned = sum(one.device.num_pinned / one.device.capacity for one in replicas)
        queued = [one.queued_work_s for one in replicas]
        self._samples.append((pinned / len(replicas), max(queued) - sum(queued) / len(queued)))

    def _autoscale(self, scaler: Autoscaler, now_s: float) -> None:
        settings = scaler.settings
        self._plan(now_s + settings.interval_s, partial(self._autoscale, scaler))
        able = [one for one in self._replicas.values() if one.replica_id not in self._draining]
        num_ongoing = sum(len(one.jobs) for one in self._replicas.values())
        change = scaler.change(len(able) + self._num_starting, num_ongoing, now_s)
        for _ in range(change):
            self._num_starting += 1
            self._plan(now_s + settings.start_s, self._has_started)
        for one in able[len(able) + min(0, change) :]:
            self._drain(one.replica_id, now_s)

    def _has_started(self, now_s: float) -> None:
        self._num_starting -= 1
        self._start_replica()

    def _arrive(self, number: int, now_s: float) -> None:
        arrival = self._served[number].arrival
        bookings = self._selector.bookings
        bookings.expire(now_s)
        prompt = self._prompt(arrival, now_s)
        while True:
            booking = self._selector.select(prompt, now_s, self._draining, arrival.blocks)
            if booking is None:
                self._served[number].is_shed = True
                return
            if booking.replica_id not in self._dead:
                break
            self._notice_death(booking.replica_id)
        limit = self._scenario.max_pending
        if limit is not None and bookings.replicas[booking.replica_id].num_pending > limit:
            self._selector.finished(booking.booking_id, now_s)
            self._served[number].is_shed = True
            return
        self._send(number, booking, now_s)

    def _prompt(self, arrival: Arrival, now_s: float) -> PromptView:
        return PromptView(
            num_tokens=arrival.num_tokens,
            shared_tokens=self._store.depth(arrival.blocks)
            * self._scenario.hardware.tokens_per_block,
            matches=self._beliefs.matches(arrival.blocks, now_s),
            session=str(arrival.session),
        )

    def _send(self, number: int, booking: Booking, now_s: float) -> None:
        served = self._served[number]
        arrival = served.arrival
        served.predicted_s = now_s - arrival.at_s + booking.plan.first_token_s
        served.replica_ids.append(booking.replica_id)
        self._bookings[number] = booking
        self._beliefs.booked(booking.replica_id, arrival.blocks)
        tokens = arrival.num_tokens, arrival.output_tokens
        hardware = self._scenario.hardware
        private = hardware.private_blocks(sum(tokens), len(arrival.blocks))
        job = Job(number, *tokens, arrival.blocks, private)
        replica = self._replicas[booking.replica_id]
        replica.arrive(job, now_s, self._store_free_s)
        if job.shared_tokens:
            load_s = job.shared_tokens * hardware.kv_token_bytes / hardware.store_total_bytes_s
            self._store_free_s = max(now_s, self._store_free_s) + load_s
        self._turn(replica, now_s)

    def _play_until(self, until_s: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            at_s, _, name, version = heapq.heappop(heap)
            replica = self._replicas.get(name)
            if not name:
                self._served[version].arrival = replace(
                    self._served[version].arrival, at_s=at_s, after=None
                )
                self._arrive(version, at_s)
            elif replica is not None and replica.version == version:
                self._turn(replica, at_s)

    def _turn(self, replica: SimReplica, now_s: float) -> None:
        happened = replica.turn(now_s)
        name = replica.replica_id
        for job in happened.first_tokens:
            self._first_token(name, job, now_s)
        if happened.evicted:
            self._beliefs.told(self._beliefs.device, name, (), happened.evicted, now_s)
        for job in happened.finished:
            booking = self._bookings.pop(job.number)
            self._selector.finished(booking.booking_id, now_s, job.output_tokens)
            for number in self._followers.pop(job.number, ()):
                self._num_events += 1
                heapq.heappush(self._heap, (now_s, self._num_events, "", number))
        replica.version += 1
        at_s = replica.next_event_s()
        if at_s is not None:
            self._num_events += 1
            event = (max(at_s, now_s), self._num_events, name, replica.version)
            heapq.heappush(self._heap, event)
        elif name in self._draining:
            self._remove(name, now_s)

    def _first_token(self, name: str, job: Job, now_s: float) -> None:
        served = self._served[job.number]
        served.ttft_s = now_s - served.arrival.at_s
        served.first_token_at_s = now_s
        served.receipt = Receipt(
            prompt_tokens=job.num_tokens,
            device=job.device_tokens,
            host=job.host_tokens,
            shared=job.shared_tokens,
            computed=job.computed_tokens,
        )
        booking = self._bookings[job.number]
        self._selector.first_token(
            booking.booking_id, now_s, served.receipt, now_s - job.prefill_started_s
        )
        beliefs = self._beliefs
        beliefs.told(beliefs.device, name, job.blocks, (), now_s)
        stored, gone = self._replicas[name].host.use(job.blocks)
        for neighbour in self._hosts[name]:
            beliefs.told(beliefs.host, neighbour.replica_id, stored, gone, now_s)
        self._store.use(job.blocks)

    def _die(self, name: str, now_s: float) -> None:
        """Its streams break, which is the first failure that anybody sees; they go elsewhere."""
        self._dead.add(name)
        jobs = self._replicas.pop(name).jobs
        if jobs:
            self._notice_death(name)
        for job in sorted(jobs, key=lambda one: one.number):
            self._arrive(job.number, now_s)

    def _start_replica(self) -> None:
        hardware = self._scenario.hardware
        name = f"replica-{self._num_named:04}"
        if self._num_named % hardware.replicas_per_host == 0:
            self._newest_host = [], LruTier(hardware.host_tokens // hardware.tokens_per_block)
        self._num_named += 1
        neighbours, host = self._newest_host
        replica = SimReplica(name, hardware, host, self._store)
        neighbours.append(replica)
        self._hosts[name] = neighbours
        self._replicas[name] = self._all[name] = replica
        self._selector.bookings.add_replica(name, hardware.device_tokens)
        self._beliefs.add_replica(name)

    def _drain(self, name: str, now_s: float) -> None:
        """It gets no more requests, and leaves when it has ended what it has."""
        self._draining.add(name)
        if not self._replicas[name].jobs:
            self._remove(name, now_s)

    def _remove(self, name: str, now_s: float) -> None:
        del self._replicas[name]
        self._draining.discard(name)
        self._selector.bookings.remove_replica(name)
        self._beliefs.remove_replica(name)

    def _notice_death(self, name: str) -> None:
        self._selector.bookings.remove_replica(name)
        self._beliefs.remove_replica(name)
