"""Choose and book in one step, and learn from what is reported: what every router does."""

import random
from collections.abc import Collection, Sequence

from actors.receipt import Receipt
from actors.routing.bookings import Booking, Bookings
from actors.routing.catalog import make_policy
from actors.routing.cost import CostModel, CostWeights
from actors.routing.measured import FirstToken, MeasuredSpeeds
from actors.routing.views import ClusterView, PromptView


class Selector:
    """One policy over one set of bookings; the same in the router and in the simulator.

    Not thread-safe, no I/O; time is given, and must not go back. The views of replicas are
    `bookings.replicas`; they are added to and removed from there.
    """

    def __init__(
        self,
        policy: str,
        bookings: Bookings,
        measured: MeasuredSpeeds | None = None,
        weights: CostWeights | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.bookings = bookings
        self.measured = measured or MeasuredSpeeds()
        self.cost = CostModel(self.measured, weights)
        self.policy = make_policy(policy, self.cost, rng or random.Random())

    def select(
        self,
        prompt: PromptView,
        now_s: float,
        avoid: Collection[str] = (),
        keys: Sequence[int] = (),
    ) -> Booking | None:
        """Choose a replica for the prompt and book it; None when there is none but `avoid`.

        `keys` name its blocks and are kept with the booking. End before what has expired.
        """
        able = list(self.bookings.replicas.values())
        if avoid:
            able = [one for one in able if one.replica_id not in avoid]
        if not able:
            return None
        cluster = ClusterView(able, self.bookings.mean_pending(now_s), now_s)
        chosen = self.policy.choose(prompt, cluster)
        plan = self.cost.plan(prompt, chosen, now_s)
        return self.bookings.book(chosen.replica_id, plan, now_s, keys)

    def first_token(
        self,
        booking_id: int,
        now_s: float,
        receipt: Receipt | None = None,
        prefill_s: float | None = None,
    ) -> Booking | None:
        """Release the work; learn from the receipt. None when the booking is gone.

        `prefill_s` is what the engine says it took from its first turn to the first token;
        without it the time since the replica's token before is taken.
        """
        booking = self.bookings.first_token(booking_id, now_s)
        if booking is None or receipt is None or booking.service_s is None:
            return booking
        seen = FirstToken(
            service_s=booking.service_s,
            computed_tokens=receipt.computed,
            cached_tokens=receipt.cached,
            host_tokens=receipt.host,
            shared_tokens=receipt.shared,
            running_kv_tokens=booking.running_kv_tokens,
            prefill_s=prefill_s,
            is_alone=booking.is_alone,
        )
        self.measured.first_token(seen)
        return booking

    def finished(self, booking_id: int, now_s: float, output_tokens: int = 0) -> Booking | None:
        """End a booking; with `output_tokens` (of a request that ran to its end) learn from it."""
        booking = self.bookings.finish(booking_id, now_s)
        if booking is not None and booking.first_token_at_s is not None and output_tokens:
            self.measured.finished(now_s - booking.first_token_at_s, output_tokens)
        return booking
