"""What a dispatcher counts, behind a protocol, so that nothing here knows where figures go."""

from typing import Literal, Protocol

from actors.engine import Receipt

Outcome = Literal["stop", "length", "cancelled", "rejected", "unavailable", "error"]
"""How a request ended; `rejected` ones could never be served."""


class Metrics(Protocol):
    """Takes note of events; cheap, never raises."""

    def first_token(self, replica_id: str, ttft_s: float, receipt: Receipt) -> None:
        """A prompt is prefilled; `ttft_s` counts from dispatch, `receipt` tells its tiers."""

    def tokens(
        self, replica_id: str, num_generated: int, num_accepted: int, gap_s: float | None
    ) -> None:
        """Tokens came out; `num_accepted` of them were accepted drafts.

        `gap_s` is the time since the tokens before them; None for a stream's first ones.
        """

    def failover(self, replica_id: str) -> None:
        """A request left this replica and goes on elsewhere."""

    def finished(self, outcome: Outcome) -> None:
        """A request ended."""


class NullMetrics:
    """Counts nothing."""

    def first_token(self, replica_id: str, ttft_s: float, receipt: Receipt) -> None:
        """See `Metrics.first_token`."""

    def tokens(
        self, replica_id: str, num_generated: int, num_accepted: int, gap_s: float | None
    ) -> None:
        """See `Metrics.tokens`."""

    def failover(self, replica_id: str) -> None:
        """See `Metrics.failover`."""

    def finished(self, outcome: Outcome) -> None:
        """See `Metrics.finished`."""
