"""Bookings: what each replica was given and has not yet brought to its end.

Load that is polled is late, and a burst would then see the same idle replica. So the router counts
what it has given out itself, in the call that chooses. A caller that died reports nothing, and its
booking would be load for ever; a long answer reports nothing between its first token and its end,
and must not be taken for one. So the wait for the first token has a short limit, a stream a long.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from actors.routing.cost import Plan
from actors.routing.pins import PinnedTokens
from actors.routing.views import ReplicaView

PENDING_MEMORY_S = 5.0
"""Time constant of the mean of pending requests."""


@dataclass(slots=True, eq=False)
class Booking:
    """One request on one replica; `keys` name the prompt's blocks, for whoever keeps the index.

    `service_s`, known after the first token, is how long the request was the replica's first, with
    its loads if nothing was pending when it was booked (`is_alone`).
    """

    booking_id: int
    replica_id: str
    plan: Plan
    booked_at_s: float
    expires_at_s: float
    keys: Sequence[int] = ()
    first_token_at_s: float | None = None
    service_s: float | None = None
    running_kv_tokens: int = 0
    is_alone: bool = False


class Bookings:
    """All replicas and what is booked on them. Time is given, not read, and must not go back.

    Nothing is ever negative; when a replica has no bookings its state is that of an idle one.
    `tokens_per_key` is what a key of a booking stands for; with 0 what requests share of KV memory
    counts for each of them.
    """

    def __init__(
        self,
        waiting_timeout_s: float = 600.0,
        running_timeout_s: float = 21600.0,
        tokens_per_key: int = 0,
    ) -> None:
        self._tokens_per_key = tokens_per_key
        self._pins: dict[str, PinnedTokens] = {}
        self._waiting_timeout_s = waiting_timeout_s
        self._running_timeout_s = running_timeout_s
        self._views: dict[str, ReplicaView] = {}
        self._queues: dict[str, dict[int, Booking]] = {}  # pending, in the order of booking
        self._running: dict[str, dict[int, Booking]] = {}
        self._by_expiry = (OrderedDict[int, Booking](), OrderedDict[int, Booking]())
        self._next_id = 1
        self._num_pending = 0
        self._mean_pending = _Mean(PENDING_MEMORY_S)

    def __len__(self) -> int:
        return sum(len(one) for one in self._by_expiry)

    @property
    def replicas(self) -> Mapping[str, ReplicaView]:
        """The live views by replica, for reading."""
        return MappingProxyType(self._views)

    def add_replica(self, replica_id: str, kv_capacity_tokens: int = 0) -> ReplicaView:
        """An idle replica of that name from now on; bookings of an older one end."""
        self.remove_replica(replica_id)
        self._queues[replica_id], self._running[replica_id] = {}, {}
        self._pins[replica_id] = PinnedTokens(self._tokens_per_key)
        self._views[replica_id] = ReplicaView(replica_id, kv_capacity_tokens)
        return self._views[replica_id]

    def remove_replica(self, replica_id: str) -> list[Booking]:
        """Forget a replica; the bookings that ended with it. An unknown one is no error."""
        if replica_id not in self._views:
            return []
        ended = [*self._queues[replica_id].values(), *self._running[replica_id].values()]
        for booking in ended:
            self.finish(booking.booking_id, booking.booked_at_s)
        for books in (self._views, self._queues, self._running, self._pins):
            del books[replica_id]
        return ended

    def mean_pending(self, now_s: float) -> float:
        """Pending requests per replica, averaged over the last seconds."""
        return self._mean_pending.at(now_s, self._num_pending / max(1, len(self._views)))

    def book(self, replica_id: str, plan: Plan, now_s: float, keys: Sequence[int] = ()) -> Booking:
        """Book a request that waits for its first token; `KeyError` for an unknown replica."""
        view, queue = self._views[replica_id], self._queues[replica_id]
        self.mean_pending(now_s)
        expires_s = now_s + self._waiting_timeout_s
        booking = Booking(self._next_id, replica_id, plan, now_s, expires_s, keys)
        booking.is_alone = not queue
        self._next_id += 1
        self._num_pending += 1
        queue[booking.booking_id] = self._by_expiry[0][booking.booking_id] = booking
        view.num_routed += 1
        view.num_pending += 1
        view.pending_work_s += plan.work_s
        view.pending_tokens += plan.computed_tokens
        view.kv_tokens += self._pins[replica_id].add(keys, plan.kv_tokens)
        self._book_links(view, plan, now_s)
        if len(queue) == 1:
            self._next_head(view, queue, now_s)
        view.floor_s = view.pending_work_s - view.head_work_s
        return booking

    def first_token(self, booking_id: int, now_s: float) -> Booking | None:
        """The first token is there: the work is released. None when it is too late or lost.

        Told again it only is a sign of life, and `service_s` None.
        """
        booking = self._by_expiry[0].pop(booking_id, None)
        if booking is None:
            return self._still_running(booking_id, now_s)
        view = self._views[booking.replica_id]
        booking.running_kv_tokens = view.running_kv_tokens
        since_s = booking.booked_at_s
        booking.service_s = now_s - (
            since_s if booking.is_alone else max(since_s, view.busy_since_s)
        )
        self._release_work(booking, now_s)
        booking.first_token_at_s = now_s
        booking.expires_at_s = now_s + self._running_timeout_s
        self._by_expiry[1][booking_id] = self._running[booking.replica_id][booking_id] = booking
        view.num_running += 1
        view.running_kv_tokens += booking.plan.kv_tokens
        return booking

    def finish(self, booking_id: int, now_s: float) -> Booking | None:
        """The request has ended, well or not. None when it is too late or lost."""
        booking = self._by_expiry[1].pop(booking_id, None)
        if booking is not None:
            self._running[booking.replica_id].pop(booking_id)
            view = self._views[booking.replica_id]
            view.num_running -= 1
            view.running_kv_tokens -= booking.plan.kv_tokens
        else:
            booking = self._by_expiry[0].pop(booking_id, None)
            if booking is None:
                return None
            self._release_work(booking, now_s)
        freed = self._pins[booking.replica_id].remove(booking.keys, booking.plan.kv_tokens)
        view = self._views[booking.replica_id]
        view.kv_tokens = max(0, view.kv_tokens - freed) if view.num_outstanding else 0
        return booking

    def get(self, booking_id: int) -> Booking | None:
        """The booking of that number; None when it is gone."""
        return self._by_expiry[0].get(booking_id) or self._by_expiry[1].get(booking_id)

    def expire(self, now_s: float) -> list[Booking]:
        """End what nobody has reported on for too long; the bookings that ended."""
        overdue = [one for queue in self._by_expiry for one in _overdue(queue, now_s)]
        for booking in overdue:
            self.finish(booking.booking_id, now_s)
        return overdue

    def _still_running(self, booking_id: int, now_s: float) -> Booking | None:
        booking = self._by_expiry[1].get(booking_id)
        if booking is not None:
            booking.service_s = None
            booking.expires_at_s = now_s + self._running_timeout_s
            self._by_expiry[1].move_to_end(booking_id)
        return booking

    def _release_work(self, booking: Booking, now_s: float) -> None:
        view, queue = self._views[booking.replica_id], self._queues[booking.replica_id]
        was_head = next(iter(queue)) == booking.booking_id
        del queue[booking.booking_id]
        self.mean_pending(now_s)
        self._num_pending -= 1
        view.num_pending -= 1
        view.pending_tokens -= booking.plan.computed_tokens
        view.pending_work_s = max(0.0, view.pending_work_s - booking.plan.work_s)
        if was_head:
            self._next_head(view, queue, now_s)
        view.floor_s = max(0.0, view.pending_work_s - view.head_work_s)

    def _next_head(self, view: ReplicaView, queue: dict[int, Booking], now_s: float) -> None:
        view.busy_since_s = max(now_s, view.busy_since_s)
        if not queue:
            view.head_work_s = view.pending_work_s = 0.0
            return
        head = next(iter(queue.values()))
        view.head_work_s = head.plan.work_s
        loaded_s = head.booked_at_s + head.plan.host_load_s + head.plan.store_load_s
        view.busy_since_s = max(now_s, loaded_s)

    @staticmethod
    def _book_links(view: ReplicaView, plan: Plan, now_s: float) -> None:
        if plan.host_load_s:
            view.host_link_free_s = max(now_s, view.host_link_free_s) + plan.host_load_s
        if plan.store_load_s:
            view.store_link_free_s = max(now_s, view.store_link_free_s) + plan.store_load_s
        view.links_free_s = max(view.host_link_free_s, view.store_link_free_s)


class _Mean:
    """The exponentially weighted mean of a value that changes at known times."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._mean = 0.0
        self._at_s: float | None = None

    def at(self, now_s: float, value: float) -> float:
        """The mean, when it was `value` since the last call."""
        if self._at_s is not None and now_s > self._at_s:
            self._mean += (value - self._mean) * -math.expm1((self._at_s - now_s) / self._memory_s)
        self._at_s = now_s if self._at_s is None else max(now_s, self._at_s)
        return self._mean


def _overdue(by_expiry: OrderedDict[int, Booking], now_s: float) -> Iterator[Booking]:
    for booking in by_expiry.values():
        if booking.expires_at_s > now_s:
            return
        yield booking
