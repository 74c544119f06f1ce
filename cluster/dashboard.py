"""The Grafana dashboard as Grafana reads it, to be loaded next to Ray's own dashboards. Pure.

`docs/make_dashboard.py` writes it to configs/grafana/kvcommons.json.
"""

from typing import Any

from cluster.dashboard_panels import ROWS, Panel, Row
from cluster.metric_table import METRICS

UID = "kvcommons"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        placed.append(_row(row, len(placed) + 1, y))
        y += 1
        for index, panel in enumerate(row.panels):
            column, line = index % COLUMNS, index // COLUMNS
            placed.append(_panel(panel, len(placed) + 1, column * WIDTH, y + line * HEIGHT))
        y += -(-len(row.panels) // COLUMNS) * HEIGHT
    return {
        "uid": UID,
        "title": "kvcommons",
        "tags": ["kvcommons", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": placed,
    }


def _row(row: Row, number: int, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": WIDTH * COLUMNS, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": source,
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    query = f"label_values({METRICS['replica_up'].exported}, replica)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "replica",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": query, "refId": "replica"},
            "definition": query,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
        },
    ]
