"""What the Grafana dashboard shows: a panel for everything in the metric table. Pure.

Queries are made from the table, so that none can ask for a metric that is named otherwise by now.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.metric_table import METRICS

RATE = "[$__rate_interval]"
COMPUTED = 'tier="computed"'


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and what each of its series is called."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A time series panel; `unit` is Grafana's word for what the values are."""

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]


def _series(name: str, *matchers: str, suffix: str = "") -> str:
    """The series of a metric, of the chosen replicas where it has a replica."""
    metric = METRICS[name]
    chosen = ['replica=~"$replica"'] if "replica" in metric.tags else []
    return f"{metric.exported}{suffix}{{{', '.join([*chosen, *matchers])}}}"


def _rate(name: str, by: Sequence[str], *matchers: str, suffix: str = "") -> str:
    series = _series(name, *matchers, suffix=suffix)
    return f"sum by ({', '.join(by)}) (rate({series}{RATE}))"


def _gauge(name: str, by: Sequence[str], *matchers: str) -> str:
    return f"sum by ({', '.join(by)}) ({_series(name, *matchers)})"


def _quantiles(name: str) -> tuple[Query, ...]:
    rate = _rate(name, ("le",), suffix="_bucket")
    return tuple(
        Query(f"histogram_quantile({q}, {rate})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)
    )


def _rates(name: str, legend: str, by: Sequence[str]) -> tuple[Query, ...]:
    return (Query(_rate(name, by), legend),)


def _gauges(name: str, legend: str, by: Sequence[str]) -> tuple[Query, ...]:
    return (Query(_gauge(name, by), legend),)


REQUEST_ROW = Row(
    "Requests",
    (
        Panel(
            "Requests",
            "choices that were dispatched, by how they ended",
            "reqps",
            _rates("requests", "{{outcome}}", ("outcome",)),
        ),
        Panel(
            "HTTP responses",
            "refusals too, by status and route",
            "reqps",
            (Query(f"{_rate('http_responses', ('route', 'status'))} > 0", "{{status}} {{route}}"),),
        ),
        Panel(
            "Time to first token", "from dispatch, all requests", "s", _quantiles("ttft_seconds")
        ),
        Panel(
            "Inter-token latency",
            "time between tokens of one answer",
            "s",
            _quantiles("inter_token_seconds"),
        ),
        Panel(
            "Prompt tokens by tier",
            "where the KV of prompts came from",
            "tokens/s",
            _rates("prompt_tokens", "{{tier}}", ("tier",)),
        ),
        Panel(
            "Prefill skipped",
            "share of prompt tokens that were not computed",
            "percentunit",
            (
                Query(
                    f"1 - sum(rate({_series('prompt_tokens', COMPUTED)}{RATE})) / "
                    f"(sum(rate({_series('prompt_tokens')}{RATE})) > 0 or vector(1))",
                    "skipped",
                ),
            ),
        ),
        Panel(
            "Generated tokens",
            "accepted ones were drafted by n-gram look-up",
            "tokens/s",
            (
                Query(_rate("generated_tokens", ("replica",)), "{{replica}}"),
                Query(_rate("accepted_draft_tokens", ("replica",)), "{{replica}} accepted"),
            ),
        ),
    ),
)

REPLICA_ROW = Row(
    "Replicas and routing",
    (
        Panel(
            "Queue",
            "requests in the replicas",
            "short",
            _gauges("queued_requests", "{{replica}} {{state}}", ("replica", "state")),
        ),
        Panel(
            "Replicas",
            "how many there are and may be; which are ready",
            "short",
            (
                Query(_gauge("replicas", ("count",)), "{{count}}"),
                Query(_gauge("replica_up", ("replica",)), "{{replica}} up"),
            ),
        ),
        Panel(
            "Failovers",
            "requests that left a replica",
            "reqps",
            _rates("failovers", "{{replica}}", ("replica",)),
        ),
        Panel(
            "Routed requests",
            "where the router sent them",
            "reqps",
            _rates("routed_requests", "{{replica}}", ("replica",)),
        ),
        Panel(
            "Routing: cached tokens, predicted and actual",
            "how well the router knows what the caches hold",
            "tokens/s",
            _rates("router_cached_tokens", "{{kind}}", ("kind",)),
        ),
        Panel(
            "Routing: predicted time to first token",
            "how far it was off, and how much later the first token came",
            "s",
            _gauges("router_ttft_seconds", "{{replica}} {{kind}}", ("replica", "kind")),
        ),
        Panel(
            "Routing: believed and not there",
            "part of the tokens that a replica was believed to have",
            "percentunit",
            _gauges("router_missing_ratio", "{{replica}}", ("replica",)),
        ),
        Panel(
            "Routing: repairs",
            "replicas routed to by load alone; messages of caches that were missed; blocks known",
            "short",
            (
                Query(_gauge("router_load_only", ("replica",)), "{{replica}} by load alone"),
                Query(_rate("router_demotions", ("replica",)), "{{replica}} begins that"),
                Query(_series("router_index_blocks"), "blocks known"),
                Query(f"sum(rate({_series('router_gaps')}{RATE}))", "messages missed"),
            ),
        ),
        Panel(
            "Canaries",
            "pairs of replicas that load what the other has stored, and when that was tried",
            "short",
            (
                Query(_gauge("canary_pairs", ("state",)), "pairs {{state}}"),
                Query(_gauge("canary_stores", ("state",)), "stores {{state}}"),
                Query(_series("canary_seconds"), "duration (s)"),
                Query(_series("canary_age_seconds"), "age (s)"),
            ),
        ),
    ),
)

TIER_ROW = Row(
    "Tiers",
    (
        Panel(
            "Bytes per tier",
            "bytes of blocks that were moved",
            "Bps",
            _rates("tier_bytes", "{{tier}} {{direction}}", ("tier", "direction")),
        ),
        Panel(
            "Bandwidth per tier while busy",
            "bytes over the seconds in which something was moved, and one read as measured",
            "Bps",
            (
                Query(
                    f"{_rate('tier_bytes', ('tier', 'direction'))} / "
                    f"({_rate('tier_busy_seconds', ('tier', 'direction'))} > 0)",
                    "{{tier}} {{direction}}",
                ),
                Query(f"avg by (tier) ({_series('tier_bytes_per_second')})", "{{tier}} one read"),
            ),
        ),
        Panel(
            "Faults by kind",
            "each was a miss, or was tried again",
            "short",
            _rates("faults", "{{tier}} {{kind}}", ("tier", "kind")),
        ),
        Panel(
            "Deadline misses",
            "requests that did not wait for blocks any longer",
            "reqps",
            _rates("deadline_misses", "{{replica}}", ("replica",)),
        ),
        Panel(
            "Cost gate: decisions",
            "load, load a part, or compute",
            "short",
            _rates("gate_decisions", "{{decision}}", ("decision",)),
        ),
        Panel(
            "Cost gate: prediction error",
            "median of |predicted - real| / real",
            "percentunit",
            _gauges("gate_error_ratio", "{{replica}} {{what}}", ("replica", "what")),
        ),
    ),
)

MEMORY_ROW = Row(
    "Memory and saves",
    (
        Panel(
            "Host memory",
            "blocks; replicas of one machine tell of the same arena",
            "short",
            _gauges("host_blocks", "{{replica}} {{state}}", ("replica", "state")),
        ),
        Panel(
            "Leases",
            "blocks that may not be evicted now",
            "short",
            _gauges("leased_blocks", "{{replica}}", ("replica",)),
        ),
        Panel(
            "Evictions",
            "blocks that left host memory; replicas of one machine tell of the same arena",
            "short",
            _rates("evicted_blocks", "{{replica}}", ("replica",)),
        ),
        Panel(
            "Device pool",
            "blocks of the engines' pools",
            "short",
            _gauges("device_blocks", "{{replica}} {{state}}", ("replica", "state")),
        ),
        Panel(
            "Saves",
            "blocks written to the shared tier, and dropped",
            "short",
            (
                Query(_rate("saved_blocks", ("replica",)), "{{replica}} saved"),
                Query(_rate("dropped_save_blocks", ("replica",)), "{{replica}} dropped"),
            ),
        ),
        Panel(
            "Pending saves",
            "blocks that wait to be written",
            "short",
            _gauges("pending_save_blocks", "{{replica}}", ("replica",)),
        ),
    ),
)

ROWS = (REQUEST_ROW, REPLICA_ROW, TIER_ROW, MEMORY_ROW)


def panels() -> list[Panel]:
    """All panels."""
    return [panel for row in ROWS for panel in row.panels]
