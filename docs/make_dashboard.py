"""Write configs/grafana/kvcommons.json and docs/metrics.md from the table of metrics.

Run `python docs/make_dashboard.py`; a test fails while the files and the table differ.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from cluster.dashboard import dashboard
from cluster.dashboard_panels import ROWS
from cluster.metric_table import FIGURES, METRICS, REQUESTS, RESPONSES, Metric

PAGE = Path(__file__).with_name("metrics.md")
DASHBOARD = Path(__file__).parents[1] / "configs" / "grafana" / "kvcommons.json"

INTRODUCTION = """\
# Metrics

All go through `ray.util.metrics`: they are at the Prometheus port of every machine's Ray, with the
names below, and on Ray's dashboard. [operations.md](operations.md#metrics) says how to set up
Prometheus and Grafana. Ray adds the tags `SessionName`, `NodeAddress`, `WorkerId`, ... to each.

This page is written by `python docs/make_dashboard.py` from the table of metrics
(`cluster/metric_table.py`).
"""


def page() -> str:
    """The page about the metrics."""
    return "\n".join(_page()) + "\n"


def dashboard_text() -> str:
    """The dashboard as its file holds it."""
    return json.dumps(dashboard(), indent=2) + "\n"


def _page() -> Iterator[str]:
    yield INTRODUCTION
    yield from _table("Counted where HTTP responses begin, in each ingress", RESPONSES)
    yield from _table("Counted where requests are dispatched, in each ingress", REQUESTS)
    yield from _table("Taken from replicas and router, by the driver", FIGURES)
    yield "## Panels\n"
    yield "The panels of `configs/grafana/kvcommons.json` and what they show:\n"
    yield "| panel | shows | metrics |\n|---|---|---|"
    for row in ROWS:
        for panel in row.panels:
            text = " ".join(query.expression for query in panel.queries)
            used = ", ".join(f"`{one.name}`" for one in METRICS.values() if one.exported in text)
            yield f"| {panel.title} | {_cell(panel.text)} | {used} |"


def _table(title: str, metrics: dict[str, Metric]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| metric | kind | tags | meaning |\n|---|---|---|---|"
    for one in metrics.values():
        tags = ", ".join(f"`{tag}`" for tag in one.tags)
        yield f"| `{one.exported}` | {one.kind} | {tags} | {_cell(one.text)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    DASHBOARD.write_text(dashboard_text(), encoding="utf-8")
