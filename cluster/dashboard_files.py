"""Puts our Grafana dashboard beside those that Ray writes, from where Grafana loads all of them."""

import json
import os
from pathlib import Path

import ray

from cluster.dashboard import UID, dashboard

FOLDER_VARIABLE = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"
"""Where Ray was told to write its dashboards, if not into its session's folder."""


def install_dashboard() -> Path | None:
    """Write the dashboard where Ray of this machine has its own; None where it has none.

    Call it in a process that has joined Ray.
    """
    session = ray.init(ignore_reinit_error=True).address_info.get("session_dir")
    default = f"{session}/metrics/grafana/dashboards"
    folder = Path(os.environ.get(FOLDER_VARIABLE, default))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None
    path = folder / f"{UID}_grafana_dashboard.json"
    path.write_text(json.dumps(dashboard()), encoding="utf-8")
    return path
