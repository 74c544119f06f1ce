"""Requests that run, by the number that their caller gave them, and their bookings. Pure.

Callers name a request themselves, so that they can report on it before a router has answered, and
again to the next router; a booking has the router's own number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.routing.bookings import Booking, Bookings
from actors.routing.knowledge import Found


@dataclass(slots=True)
class OpenRequest:
    """A request that runs, and what was believed of its blocks when it was booked.

    `is_ours`: this router has chosen its replica, so its predictions can be compared.
    """

    booking: Booking
    keys: Sequence[int]
    found: Found
    is_ours: bool = True


class OpenRequests:
    """Open requests and their bookings, which end together."""

    def __init__(self, bookings: Bookings) -> None:
        self.num_expired = 0
        self._bookings = bookings
        self._open: dict[int, OpenRequest] = {}
        self._request_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def get(self, request_id: int) -> OpenRequest | None:
        """The request of that number; None when it has ended, expired, or gone with its replica."""
        return self._open.get(request_id)

    def add(self, request_id: int, one: OpenRequest, now_s: float) -> None:
        """A request is booked; one of the same number before it has ended."""
        former = self._open.get(request_id)
        if former is not None:
            self._bookings.finish(former.booking.booking_id, now_s)
            self.ended(former.booking)
        self._open[request_id] = one
        self._request_of[one.booking.booking_id] = request_id

    def ended(self, booking: Booking) -> None:
        """The booking has ended, and the request with it."""
        del self._open[self._request_of.pop(booking.booking_id)]

    def expire(self, now_s: float) -> None:
        """End what nobody has reported on for too long."""
        for booking in self._bookings.expire(now_s):
            self.ended(booking)
            self.num_expired += 1

    def remove_replica(self, replica_id: str) -> None:
        """Forget a replica and what ran there; an unknown one is no error."""
        for booking in self._bookings.remove_replica(replica_id):
            self.ended(booking)
