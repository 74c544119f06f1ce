"""A dispatcher's figures in Ray's metrics: on its dashboard and at its Prometheus port.

Tags have few values (replicas, tiers, outcomes): each combination is a time series that is kept.
"""

from ray.util.metrics import Counter, Histogram

from actors.engine import Receipt
from actors.metrics import Outcome

TTFT_BOUNDARIES_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


class RayMetrics:
    """Metrics through Ray; make it in the process that dispatches, once."""

    def __init__(self) -> None:
        self._requests = Counter("kvcommons_requests", "Requests by how they ended", ("outcome",))
        self._failovers = Counter(
            "kvcommons_failovers",
            "Requests that left a replica and went on elsewhere",
            ("replica",),
        )
        self._ttft_s = Histogram(
            "kvcommons_ttft_seconds",
            "Time from dispatch to the first token",
            TTFT_BOUNDARIES_S,
            ("replica",),
        )
        self._prompt_tokens = Counter(
            "kvcommons_prompt_tokens", "Prompt tokens by where they came from", ("replica", "tier")
        )
        self._generated = Counter("kvcommons_generated_tokens", "Tokens generated", ("replica",))
        self._accepted = Counter(
            "kvcommons_accepted_draft_tokens", "Generated tokens that were drafted", ("replica",)
        )

    def first_token(self, replica_id: str, ttft_s: float, receipt: Receipt) -> None:
        """See `Metrics.first_token`."""
        self._ttft_s.observe(ttft_s, {"replica": replica_id})
        for tier in ("device", "host", "shared", "computed"):
            _add(self._prompt_tokens, getattr(receipt, tier), replica=replica_id, tier=tier)

    def tokens(self, replica_id: str, num_generated: int, num_accepted: int) -> None:
        """See `Metrics.tokens`."""
        _add(self._generated, num_generated, replica=replica_id)
        _add(self._accepted, num_accepted, replica=replica_id)

    def failover(self, replica_id: str) -> None:
        """See `Metrics.failover`."""
        _add(self._failovers, 1, replica=replica_id)

    def finished(self, outcome: Outcome) -> None:
        """See `Metrics.finished`."""
        _add(self._requests, 1, outcome=outcome)


def _add(counter: Counter, amount: int, **tags: str) -> None:
    if amount:  # Ray's counters refuse zero
        counter.inc(amount, tags)
