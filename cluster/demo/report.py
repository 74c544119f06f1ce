"""The figures of a run as one JSON document and a bar chart.

The document names what it was measured on: a figure without its machine, versions and settings
cannot be compared with another one.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

PACKAGES = ("kvcommons", "torch", "transformers", "ray", "pyarrow", "fsspec")
BAR_COLOURS = {
    "device": "#2a9d8f",
    "host": "#8ab17d",
    "shared": "#e9c46a",
    "computed": "#e76f51",
}


class ScenarioResult(Protocol):
    """What every scenario gives back."""

    def as_json(self) -> dict[str, Any]:
        """The figures, with the issue's names."""

    def summary(self) -> str:
        """The outcome in words for somebody new to all this."""

    def failures(self) -> list[str]:
        """The expectations that were not met, each a sentence; empty when all is well."""


def build_report(
    results: Mapping[str, ScenarioResult], config: Mapping[str, Any], wall_s: float
) -> dict[str, Any]:
    """Everything about one run, ready for `json.dumps`."""
    failures = {name: result.failures() for name, result in results.items()}
    return {
        "scenario": {name: result.as_json() for name, result in results.items()},
        "ok": not any(failures.values()),
        "failures": {name: found for name, found in failures.items() if found},
        "wall_s": wall_s,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "config": dict(config),
    }


def hardware() -> dict[str, Any]:
    """What this machine is, as far as it decides about speed."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def versions() -> dict[str, str]:
    """Python and the packages that decide about speed and results."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"


def write_json(report: Mapping[str, Any], file: Path) -> None:
    """Write the report, making the folder; a reader never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def draw_load_chart(
    modes: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], file: Path
) -> None:
    """A PNG: time to first token, throughput and prompt tokens by tier for each mode.

    `modes` are the objects of the report's `load`, `labels` what to write below their bars.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    ttft, speed, tokens = figure.subplots(1, 3)
    names = [labels[mode] for mode in modes]
    _paired_bars(ttft, names, modes)
    speed.bar(names, [mode["tokens_per_s"] for mode in modes.values()], color="#457b9d")
    speed.set_title("Generated tokens per second\n(more is better)")
    _stacked_tiers(tokens, names, list(modes.values()))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _paired_bars(axes: Any, names: Sequence[str], modes: Mapping[str, Mapping[str, Any]]) -> None:
    width = 0.38
    for offset, key, label, colour in (
        (-width / 2, "ttft_p50_s", "median", "#457b9d"),
        (width / 2, "ttft_p99_s", "99th percentile", "#a8c5da"),
    ):
        places = [place + offset for place in range(len(names))]
        heights = [mode[key] for mode in modes.values()]
        bars = axes.bar(places, heights, width, label=label, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_title("Seconds to the first token\n(less is better)")
    _legend_below(axes)


def _stacked_tiers(axes: Any, names: Sequence[str], modes: Sequence[Mapping[str, Any]]) -> None:
    bottoms = [0] * len(names)
    for tier, colour in BAR_COLOURS.items():
        heights = [mode["tokens_from"][tier] for mode in modes]
        axes.bar(names, heights, bottom=bottoms, label=tier, color=colour)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_title("Where the prompt tokens came from\n(computed is the slow way)")
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False)
