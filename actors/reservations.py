"""Reservations: which requests run where, and when to believe no more that they do.

A caller that died reports nothing, and its booking would count as load for ever; a long answer
reports nothing either between its first token and its end, and must not be taken for one. So the
wait for the first token, which blocks others, has a short limit, and a running stream a long one.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shared_cache.hashing import BlockHash


@dataclass(slots=True, eq=False)
class Reservation:
    """One booked request; `known_tokens` and `shared_tokens` are what was believed when booking."""

    replica_id: str
    hashes: Sequence[BlockHash]
    work_tokens: int
    known_tokens: int
    shared_tokens: int
    is_saved: bool = True
    expires_at_s: float = 0.0


class Reservations:
    """The reservations by number; one is waiting until it has started, and expires in both states.

    Time is given, not read, and must not go back.
    """

    def __init__(self, waiting_timeout_s: float, running_timeout_s: float) -> None:
        self._waiting_timeout_s = waiting_timeout_s
        self._running_timeout_s = running_timeout_s
        self._waiting: OrderedDict[int, Reservation] = OrderedDict()  # both by expiry
        self._running: OrderedDict[int, Reservation] = OrderedDict()
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, reservation: Reservation, now_s: float) -> int:
        """Book a request that waits for its first token; its number."""
        reservation_id = self._next_id
        self._next_id += 1
        reservation.expires_at_s = now_s + self._waiting_timeout_s
        self._waiting[reservation_id] = reservation
        return reservation_id

    def get(self, reservation_id: int) -> Reservation | None:
        """The reservation of that number; None when it is gone."""
        return self._waiting.get(reservation_id) or self._running.get(reservation_id)

    def start(self, reservation_id: int, now_s: float) -> Reservation | None:
        """The first token is there, the long limit begins; None when the reservation is gone."""
        reservation = self._take(reservation_id)
        if reservation is not None:
            reservation.expires_at_s = now_s + self._running_timeout_s
            self._running[reservation_id] = reservation
        return reservation

    def pop(self, reservation_id: int) -> Reservation:
        """Remove and return a reservation; `KeyError` when it is gone."""
        reservation = self._take(reservation_id)
        if reservation is None:
            raise KeyError(reservation_id)
        return reservation

    def expired(self, now_s: float) -> list[int]:
        """The numbers of those that nobody has reported on for too long."""
        return [*_overdue(self._waiting, now_s), *_overdue(self._running, now_s)]

    def _take(self, reservation_id: int) -> Reservation | None:
        waiting = self._waiting.pop(reservation_id, None)
        return waiting or self._running.pop(reservation_id, None)


def _overdue(by_expiry: OrderedDict[int, Reservation], now_s: float) -> Iterator[int]:
    for reservation_id, reservation in by_expiry.items():
        if reservation.expires_at_s > now_s:
            return
        yield reservation_id
