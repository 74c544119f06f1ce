"""Every metric of kvcommons: its name, kind, tags and meaning, in one place.

What exports a metric, the Grafana dashboard and the page about them all read this table; named in
three places, a panel would go on asking for a metric that nobody exports any more. Pure.

Tags have few values (replicas, tiers, outcomes): each combination is a time series that is kept.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "kvcommons_"
RAY_PREFIX = "ray_"
"""What Ray puts before every name at its Prometheus port."""

MetricKind = Literal["counter", "gauge", "histogram"]

TTFT_BOUNDARIES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
GAP_BOUNDARIES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `name` is without prefixes, `boundaries` are a histogram's."""

    name: str
    kind: MetricKind
    text: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def ray_name(self) -> str:
        """The name that Ray's metrics API is given."""
        return PREFIX + self.name

    @property
    def exported(self) -> str:
        """The name at the Prometheus port; a histogram's is followed by `_bucket`, `_sum`, ..."""
        return RAY_PREFIX + self.ray_name + ("_total" if self.kind == "counter" else "")


def _metrics(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


RESPONSES = _metrics(
    Metric(
        "http_responses",
        "counter",
        "HTTP responses by route and status, those of refused requests too; a path that is none of "
        "ours is the route `other`",
        ("route", "status"),
    ),
)
"""Counted where a response begins: in each ingress."""

REQUESTS = _metrics(
    Metric(
        "requests",
        "counter",
        "what was dispatched, by how it ended: stop, length, cancelled, rejected, unavailable, "
        "error; each choice of a request is one, and so are probes of `/health` and warmed prompts",
        ("outcome",),
    ),
    Metric(
        "failovers", "counter", "requests that left a replica and went on elsewhere", ("replica",)
    ),
    Metric(
        "ttft_seconds",
        "histogram",
        "time from dispatch to the first token",
        ("replica",),
        TTFT_BOUNDARIES_S,
    ),
    Metric(
        "inter_token_seconds",
        "histogram",
        "time between two messages with tokens of one answer, by the tokens in the later one",
        ("replica",),
        GAP_BOUNDARIES_S,
    ),
    Metric(
        "prompt_tokens",
        "counter",
        "prompt tokens by where they came from: device, host, shared, computed",
        ("replica", "tier"),
    ),
    Metric("generated_tokens", "counter", "tokens generated", ("replica",)),
    Metric(
        "accepted_draft_tokens",
        "counter",
        "generated tokens that were drafted by n-gram look-up",
        ("replica",),
    ),
)
"""Counted where a request is dispatched: in each ingress."""

FIGURES = _metrics(
    Metric("replica_up", "gauge", "1 while a replica is ready, else 0", ("replica",)),
    Metric(
        "replicas",
        "gauge",
        "replicas: ready, wanted now, and the least and the most that may be",
        ("count",),
    ),
    Metric(
        "queued_requests",
        "gauge",
        "requests in a replica: staging (on their way to the engine), waiting, running",
        ("replica", "state"),
    ),
    Metric(
        "device_blocks", "gauge", "blocks of the engine's pool: used, free", ("replica", "state")
    ),
    Metric(
        "host_blocks",
        "gauge",
        "blocks of host memory as a replica sees them: used, free, reserved",
        ("replica", "state"),
    ),
    Metric(
        "leased_blocks", "gauge", "blocks of host memory that somebody has leased", ("replica",)
    ),
    Metric(
        "evicted_blocks",
        "counter",
        "blocks of this model that left host memory to make room; replicas of one machine all "
        "tell of the same arena",
        ("replica",),
    ),
    Metric(
        "tier_bytes",
        "counter",
        "bytes of blocks read from a tier, and written to it",
        ("replica", "tier", "direction"),
    ),
    Metric(
        "tier_busy_seconds",
        "counter",
        "seconds in which at least one such read or write was under way",
        ("replica", "tier", "direction"),
    ),
    Metric(
        "tier_bytes_per_second",
        "gauge",
        "bandwidth of one read of a tier, as the cost gate has measured it",
        ("replica", "tier"),
    ),
    Metric("saved_blocks", "counter", "blocks written to the shared tier", ("replica",)),
    Metric(
        "dropped_save_blocks",
        "counter",
        "blocks that were computed and not saved: no room, no time, or the store refused",
        ("replica",),
    ),
    Metric("pending_save_blocks", "gauge", "blocks that wait to be written", ("replica",)),
    Metric(
        "gate_decisions",
        "counter",
        "decisions of the cost gate: load, split (load the head), compute; untested ones load "
        "because something is not measured yet, probes fetch what nobody waits for",
        ("replica", "decision"),
    ),
    Metric(
        "gate_error_ratio",
        "gauge",
        "how far the cost gate's predictions were off: median of recent |predicted - real| / real",
        ("replica", "what"),
    ),
    Metric(
        "routed_requests", "counter", "requests that the router has sent to a replica", ("replica",)
    ),
    Metric(
        "router_cached_tokens",
        "counter",
        "prompt tokens that the router believed to be cached (predicted), and that were (actual)",
        ("kind",),
    ),
    Metric(
        "router_ttft_seconds",
        "gauge",
        "how far the router's predicted time to first token was off, lately: error (mean distance "
        "from the real one), bias (how much later that came)",
        ("replica", "kind"),
    ),
    Metric(
        "router_missing_ratio",
        "gauge",
        "part of the tokens believed to be on a replica that were not there, lately",
        ("replica",),
    ),
    Metric(
        "router_load_only",
        "gauge",
        "1 while too much of what a replica is believed to have is missing there to be used",
        ("replica",),
    ),
    Metric("router_index_blocks", "gauge", "blocks that the router knows of"),
    Metric(
        "router_demotions",
        "counter",
        "times that a replica was routed to by its load alone, as too much was missing there",
        ("replica",),
    ),
    Metric(
        "router_gaps",
        "counter",
        "messages of what caches hold that the router missed, and has repaired since",
    ),
    Metric(
        "faults",
        "counter",
        "what went wrong at a tier: error (raised, hung or timed out), corrupt, foreign and "
        "vanished objects, retry",
        ("replica", "tier", "kind"),
    ),
    Metric(
        "deadline_misses",
        "counter",
        "requests that went on without blocks that did not arrive in time",
        ("replica",),
    ),
    Metric(
        "canary_pairs",
        "gauge",
        "pairs of replicas by what the last canary showed: ok, failed",
        ("state",),
    ),
    Metric(
        "canary_stores",
        "gauge",
        "replicas by whether they can be asked and can use the shared tier: ok, failed",
        ("state",),
    ),
    Metric("canary_seconds", "gauge", "how long the last round of canaries took"),
    Metric("canary_age_seconds", "gauge", "how long ago that round ended"),
)
"""Taken from replicas and router by the driver, once a period."""

METRICS = {**RESPONSES, **REQUESTS, **FIGURES}
