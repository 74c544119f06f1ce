"""Figures in Ray's metrics: on its dashboard and at its Prometheus port. See `metric_table`."""

import logging
import math
import threading
from collections.abc import Callable, Iterable
from itertools import product

from ray.util.metrics import Counter, Gauge, Histogram

from actors.engine import Receipt
from actors.metrics import Outcome
from cluster.figures import Figure
from cluster.metric_table import METRICS, REQUESTS

logger = logging.getLogger(__name__)

OUTCOMES: tuple[Outcome, ...] = (
    "stop",
    "length",
    "cancelled",
    "rejected",
    "unavailable",
    "error",
)
STATUSES = ("200", "401", "413", "429", "503")
"""What each route tells from the start; the others only once they come."""
TIERS = ("device", "host", "shared", "computed")

NEARLY_ZERO = math.ulp(0.0)
"""Begins a counter: Ray's take no zero, and one that appears only with its first event has no rate
at that moment. Added to a whole number it changes nothing."""


class RayMetrics:
    """A dispatcher's metrics; make it in the process that dispatches, once."""

    def __init__(self) -> None:
        self._counters = {
            one.name: Counter(one.ray_name, one.text, one.tags)
            for one in REQUESTS.values()
            if one.kind == "counter"
        }
        self._ttft_s = _histogram("ttft_seconds")
        self._gap_s = _histogram("inter_token_seconds")
        self._known_replicas: set[str] = set()
        for outcome in OUTCOMES:
            self._add("requests", 0, outcome=outcome)

    def first_token(self, replica_id: str, ttft_s: float, receipt: Receipt) -> None:
        """See `Metrics.first_token`."""
        self._begin(replica_id)
        self._ttft_s.observe(ttft_s, {"replica": replica_id})
        for tier in TIERS:
            self._add("prompt_tokens", getattr(receipt, tier), replica=replica_id, tier=tier)

    def tokens(
        self, replica_id: str, num_generated: int, num_accepted: int, gap_s: float | None
    ) -> None:
        """See `Metrics.tokens`."""
        self._add("generated_tokens", num_generated, replica=replica_id)
        self._add("accepted_draft_tokens", num_accepted, replica=replica_id)
        if gap_s is not None and num_generated:
            self._gap_s.observe(gap_s / num_generated, {"replica": replica_id})

    def failover(self, replica_id: str) -> None:
        """See `Metrics.failover`."""
        self._begin(replica_id)
        self._add("failovers", 1, replica=replica_id)

    def finished(self, outcome: Outcome) -> None:
        """See `Metrics.finished`."""
        self._add("requests", 1, outcome=outcome)

    def _begin(self, replica_id: str) -> None:
        """Tell the zeros of a replica that is heard of for the first time."""
        if replica_id in self._known_replicas:
            return
        self._known_replicas.add(replica_id)
        for name in ("failovers", "generated_tokens", "accepted_draft_tokens"):
            self._add(name, 0, replica=replica_id)
        for tier in TIERS:
            self._add("prompt_tokens", 0, replica=replica_id, tier=tier)

    def _add(self, name: str, amount: int, **tags: str) -> None:
        self._counters[name].inc(amount or NEARLY_ZERO, tags)


class ResponseCounter:
    """Counts HTTP responses; begins with the zeros of these routes."""

    def __init__(self, routes: Iterable[str]) -> None:
        metric = METRICS["http_responses"]
        self._counter = Counter(metric.ray_name, metric.text, metric.tags)
        for route, status in product(sorted(set(routes)), STATUSES):
            self._counter.inc(NEARLY_ZERO, {"route": route, "status": status})

    def add(self, route: str, status: int) -> None:
        """One response more."""
        self._counter.inc(1, {"route": route, "status": str(status)})


class FigureExporter:
    """Exports figures; of counters what has come since the last time. For one thread."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._totals: dict[Figure, float] = {}
        self._told: set[Figure] = set()

    def export(self, figures: Iterable[Figure]) -> None:
        """Take note of these figures; a total that has fallen is that of a new process.

        A gauge that is not told any more (its replica is away) becomes 0: Ray would keep its last
        value.
        """
        told: set[Figure] = set()
        for figure in figures:
            if METRICS[figure.name].kind == "counter":
                self._count(figure)
            else:
                self._gauge(figure.name).set(figure.value, dict(figure.tags))
                told.add(_series(figure))
        for gone in self._told - told:
            self._gauge(gone.name).set(0.0, dict(gone.tags))
        self._told = told

    def _count(self, figure: Figure) -> None:
        series = _series(figure)
        before = self._totals.get(series)
        self._totals[series] = figure.value
        amount = figure.value if before is None or figure.value < before else figure.value - before
        if amount > 0 or before is None:
            self._counter(figure.name).inc(amount or NEARLY_ZERO, dict(figure.tags))

    def _counter(self, name: str) -> Counter:
        if name not in self._counters:
            metric = METRICS[name]
            self._counters[name] = Counter(metric.ray_name, metric.text, metric.tags)
        return self._counters[name]

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            metric = METRICS[name]
            self._gauges[name] = Gauge(metric.ray_name, metric.text, metric.tags)
        return self._gauges[name]


class Reporter:
    """A thread that exports what `take` gives, once a period; `stop` ends it."""

    def __init__(self, take: Callable[[], Iterable[Figure]], period_s: float) -> None:
        self._take = take
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcommons-metrics", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; returns when nothing more will be reported."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        exporter = FigureExporter()
        while not self._stop.is_set():
            try:
                exporter.export(self._take())
            except Exception:  # figures that fail must not be the last ones
                logger.exception("reporting metrics failed; trying again")
            self._stop.wait(self._period_s)


def _series(figure: Figure) -> Figure:
    """The name of its time series: the figure without its value."""
    return Figure(figure.name, 0.0, figure.tags)


def _histogram(name: str) -> Histogram:
    metric = METRICS[name]
    return Histogram(metric.ray_name, metric.text, list(metric.boundaries), metric.tags)
