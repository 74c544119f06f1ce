"""What is told of a run: times to first token, where the tokens came from, balance."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.routing.scenario import Outcome, Served


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests that came after the warm-up; rates are shares of their prompt tokens.

    `queue_imbalance_s` is how much more prefill the longest queue has than the mean one, on
    average; `prediction_error_s` the mean distance of predicted and real times to first token.
    """

    num_requests: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    device_rate: float
    host_rate: float
    shared_rate: float
    shed_rate: float
    queue_imbalance_s: float
    busy_share: float
    pinned_share: float
    prediction_error_s: float

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that were not computed."""
        return self.device_rate + self.host_rate + self.shared_rate


def summarise(outcome: Outcome) -> Figures:
    """The figures of one run. Raises `ValueError` when nothing was served after the warm-up."""
    measured = [one for one in outcome.served if one.arrival.at_s >= outcome.scenario.warm_up_s]
    done = [one for one in measured if one.ttft_s is not None]
    if not done:
        raise ValueError("no request was served after the warm-up; make the run longer")
    ttft_s = sorted(one.ttft_s for one in done if one.ttft_s is not None)
    errors_s = [abs(one.predicted_s - (one.ttft_s or 0.0)) for one in done]
    replica_s = max(1, len(outcome.busy_s)) * max(1e-9, outcome.end_s)
    return Figures(
        num_requests=len(measured),
        ttft_mean_s=sum(ttft_s) / len(ttft_s),
        ttft_p50_s=percentile(ttft_s, 0.5),
        ttft_p90_s=percentile(ttft_s, 0.9),
        ttft_p99_s=percentile(ttft_s, 0.99),
        device_rate=_rate(done, "device"),
        host_rate=_rate(done, "host"),
        shared_rate=_rate(done, "shared"),
        shed_rate=1 - len(done) / len(measured),
        queue_imbalance_s=outcome.queue_imbalance,
        busy_share=sum(outcome.busy_s.values()) / replica_s,
        pinned_share=outcome.pinned_share,
        prediction_error_s=sum(errors_s) / len(errors_s),
    )


def percentile(ranked: Sequence[float], fraction: float) -> float:
    """The value at that fraction of ascending values, nearest rank."""
    return ranked[min(len(ranked) - 1, int(fraction * len(ranked)))]


def _rate(done: Sequence[Served], tier: str) -> float:
    tokens = sum(getattr(one.receipt, tier) for one in done)
    return float(tokens / sum(one.arrival.num_tokens for one in done))
