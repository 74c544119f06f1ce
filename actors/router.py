"""The router: live load, knowledge of caches and bookings, decided and booked in one call.

Load that is polled is late, and a burst of requests would then all see the same idle replica. So a
route is booked in the call that chooses it; the caller reports the first token and the end. What a
caller that died never reports expires. What a dead replica held goes with it, what a receipt
disproves is believed no more, and what is wrong too often is not used.
"""

import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from actors.cache_changes import CacheTier, Cursor, TierChanges
from actors.open_requests import OpenRequest, OpenRequests
from actors.router_config import RouterConfig as RouterConfig
from actors.router_messages import (
    Batch,
    Finished,
    FirstToken,
    Lost,
    ReplicaInfo,
    Reply,
    Report,
    Route,
    RouteRequest,
    Running,
)
from actors.router_snapshot import ReplicaSnapshot, RouterSnapshot
from actors.routing import Bookings, CostWeights, PromptView, Selector
from actors.routing.accuracy import Accuracy
from actors.routing.index import BlockIndex
from actors.routing.knowledge import NOTHING_FOUND, SHARED_TIER, CacheKnowledge

SESSION_TOKENS = 256
"""A conversation is known by the block behind so many tokens, where nobody names it."""


@dataclass(slots=True)
class _Replica:
    info: ReplicaInfo
    accuracy: Accuracy = field(default_factory=Accuracy)
    alive: bool = True
    num_routed: int = 0


class Router:
    """Chooses replicas and keeps book; not thread-safe, no I/O.

    `shares` tells whether the replicas write to a shared tier, so that what one computed counts
    as a fetch, not as a computation, for the others; `reuses`, whether their devices keep blocks.
    """

    def __init__(
        self,
        config: RouterConfig,
        tokens_per_block: int,
        shares: bool,
        reuses: bool = True,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._shares = shares
        self._reuses = reuses
        stride = config.stride(tokens_per_block)
        self._tokens_per_key = tokens_per_block * stride
        self._bookings = Bookings(
            config.reservation_timeout_s, config.stream_timeout_s, self._tokens_per_key
        )
        weights = CostWeights(
            config.doubt, config.price, config.memory_price, config.session_affinity
        )
        self._selector = Selector(config.policy, self._bookings, weights=weights, rng=rng)
        index = BlockIndex(config.index_blocks, config.index_ttl_s)
        self._knowledge = CacheKnowledge(index, self._tokens_per_key, stride > 1)
        self._replicas: dict[str, _Replica] = {}
        self._open = OpenRequests(self._bookings)
        self._version = (uuid.uuid4().hex, 0)
        self._predicted_cached = self._actual_cached = 0

    def register(self, info: ReplicaInfo) -> bool:
        """Route to this replica from now on; True when that is news.

        The same process again is a no-op unless it was marked dead.
        """
        known = self._replicas.get(info.replica_id)
        if known is not None and known.alive and known.info.boot_id == info.boot_id:
            return False
        self._forget(info.replica_id)
        num_routed = known.num_routed if known else 0
        self._replicas[info.replica_id] = _Replica(info, num_routed=num_routed)
        self._bookings.add_replica(info.replica_id, info.kv_capacity_tokens)
        self._knowledge.add_replica(info.replica_id, info.machine)
        self._list_changed()
        return True

    def mark_dead(self, replica_id: str, boot_id: str) -> bool:
        """Route no more to this process; its knowledge and bookings go. True when news.

        A report about another boot than the current one is late and does nothing.
        """
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.alive or replica.info.boot_id != boot_id:
            return False
        self._forget(replica_id)
        replica.alive = False
        return True

    def unregister(self, replica_id: str) -> None:
        """Forget a replica that will not come back; an unknown one is no error."""
        self._forget(replica_id)
        self._replicas.pop(replica_id, None)

    def serve(self, batch: Batch) -> Reply:
        """Take in the reports of one caller, then choose for its requests, in their order."""
        for report in batch.reports:
            self.take(report)
        routes = tuple(self.route(request) for request in batch.requests)
        alive = None
        if batch.known_replicas != self._version:
            alive = tuple((n, r.info.boot_id) for n, r in self._replicas.items() if r.alive)
        return Reply(routes, self._version, alive)

    def route(self, request: RouteRequest) -> Route | None:
        """Choose a replica for a prompt and book the work; None when none but `avoid` is alive."""
        now_s = self._clock()
        self._open.expire(now_s)
        found = self._knowledge.look_up(request.keys)
        prompt = PromptView(
            request.num_tokens,
            found.shared_tokens if self._shares else 0,
            found.matches,
            request.session or self._session_of(request.keys),
            request.output_tokens,
        )
        booking = self._selector.select(prompt, now_s, request.avoid, request.keys)
        if booking is None:
            return None
        self._open.add(request.request_id, OpenRequest(booking, request.keys, found), now_s)
        if self._reuses:
            self._knowledge.book(booking.replica_id, request.keys, found)
        replica = self._replicas[booking.replica_id]
        replica.num_routed += 1
        return Route(
            request_id=request.request_id,
            replica_id=booking.replica_id,
            boot_id=replica.info.boot_id,
            known_tokens=prompt.match(booking.replica_id).host_tokens,
            shared_tokens=prompt.shared_tokens,
            work_tokens=booking.plan.computed_tokens,
            first_token_s=booking.plan.first_token_s,
        )

    def take(self, report: Report) -> bool:
        """Take in what a caller reports; False when it is about something that is gone."""
        if isinstance(report, FirstToken):
            return self._first_token(report)
        if isinstance(report, Finished):
            return self._finished(report)
        if isinstance(report, Lost):
            return self.mark_dead(report.replica_id, report.boot_id)
        return self._take_over(report)

    def learn(self, source: str, changes: TierChanges) -> bool:
        """Believe what a replica (its boot is the changes' epoch) or a machine tells of its cache.

        False when it is about a process that is gone, or something before it is missing.
        """
        replica = self._replicas.get(source)
        boot_id = changes.end.epoch
        if replica is not None and (not replica.alive or replica.info.boot_id != boot_id):
            return False
        return self._knowledge.learn(source, changes)

    def forget_machine(self, machine: str) -> None:
        """A machine is gone, and its host memory with it; an unknown one is no error."""
        self._knowledge.remove_machine(machine)

    def cursors(self, sources: Sequence[str]) -> Mapping[str, Mapping[CacheTier, Cursor]]:
        """How far each source was read; a tier that is not there is to tell everything."""
        return {source: self._knowledge.cursors(source) for source in sources}

    def work_off(self) -> bool:
        """Do some of what can wait; False when there is more. To be called while nobody waits."""
        now_s = self._clock()
        self._open.expire(now_s)
        for name, replica in self._replicas.items():
            if replica.alive:
                view = self._bookings.replicas[name]
                view.is_load_only = replica.accuracy.is_load_only(now_s)
        is_learnt = self._knowledge.work_off()
        return self._knowledge.index.tidy(now_s) and is_learnt

    def snapshot(self) -> RouterSnapshot:
        """What the router believes now."""
        now_s = self._clock()
        self._open.expire(now_s)
        index = self._knowledge.index
        return RouterSnapshot(
            policy=self._config.policy,
            replicas=tuple(self._snapshot_of(name, now_s) for name in sorted(self._replicas)),
            shared_blocks=index.num_blocks(SHARED_TIER),
            num_reservations=len(self._open),
            num_expired=self._open.num_expired,
            predicted_cached_tokens=self._predicted_cached,
            actual_cached_tokens=self._actual_cached,
            index_blocks=len(index),
            num_gaps=self._knowledge.num_gaps,
            num_snapshots=self._knowledge.num_snapshots,
        )

    def _session_of(self, keys: Sequence[int]) -> str | None:
        """A name for what begins like this prompt."""
        return (
            str(keys[min(len(keys) - 1, SESSION_TOKENS // self._tokens_per_key)]) if keys else None
        )

    def _first_token(self, report: FirstToken) -> bool:
        """The prefill is done: release its work, learn from the receipt."""
        now_s = self._clock()
        one = self._open.get(report.request_id)
        if one is None:
            return False
        booking, receipt = one.booking, report.receipt
        is_first = booking.first_token_at_s is None
        self._selector.first_token(booking.booking_id, now_s, receipt, report.prefill_s)
        if not is_first or not one.is_ours:
            return True
        replica = self._replicas[booking.replica_id]
        real_s = now_s - booking.booked_at_s if report.ttft_s is None else report.ttft_s
        replica.accuracy.note_first_token(booking.plan.first_token_s, real_s)
        match = one.found.matches.get(booking.replica_id)
        own_tokens = min(match.host_tokens, receipt.prompt_tokens) if match else 0
        replica.accuracy.note_tokens(own_tokens, receipt.device + receipt.host, now_s)
        self._predicted_cached += max(own_tokens, one.found.shared_tokens)
        self._actual_cached += receipt.cached
        if self._shares:
            is_told = replica.info.machine is not None
            self._knowledge.correct_shared(one.keys, one.found, receipt.cached, is_told)
        return True

    def _finished(self, report: Finished) -> bool:
        """The request has ended, well or not."""
        one = self._open.get(report.request_id)
        if one is None:
            return False
        booking, index = one.booking, self._knowledge.index
        has_started = booking.first_token_at_s is not None
        self._selector.finished(booking.booking_id, self._clock(), report.output_tokens)
        self._open.ended(booking)
        if not self._reuses:
            return True
        if has_started:
            index.add(booking.replica_id, report.new_keys)
        else:  # nothing was computed; should another request bring it too, the engine tells so
            known = one.found.depths.get(booking.replica_id, 0)
            index.remove(booking.replica_id, one.keys[known:])
        return True

    def _take_over(self, report: Running) -> bool:
        """Book what a caller has sent somewhere while this router was away."""
        replica = self._replicas.get(report.replica_id)
        is_there = replica is not None and replica.alive
        if replica is None or not is_there or replica.info.boot_id != report.boot_id:
            return False
        now_s = self._clock()
        view = self._bookings.replicas[report.replica_id]
        plan = self._selector.cost.plan(PromptView(report.num_tokens), view, now_s)
        booking = self._bookings.book(report.replica_id, plan, now_s)
        running = OpenRequest(booking, (), NOTHING_FOUND, is_ours=False)
        self._open.add(report.request_id, running, now_s)
        if report.has_first_token:
            self._bookings.first_token(booking.booking_id, now_s)
        return True

    def _forget(self, replica_id: str) -> None:
        self._open.remove_replica(replica_id)
        self._knowledge.remove_replica(replica_id)
        self._list_changed()

    def _list_changed(self) -> None:
        self._version = (self._version[0], self._version[1] + 1)

    def _snapshot_of(self, replica_id: str, now_s: float) -> ReplicaSnapshot:
        replica = self._replicas[replica_id]
        view = self._bookings.replicas.get(replica_id)
        return ReplicaSnapshot(
            replica_id=replica_id,
            boot_id=replica.info.boot_id,
            alive=replica.alive,
            pending_tokens=view.pending_tokens if view else 0,
            num_outstanding=view.num_outstanding if view else 0,
            known_blocks=self._knowledge.index.num_blocks(replica_id),
            num_routed=replica.num_routed,
            accuracy=replica.accuracy.snapshot(now_s),
        )
