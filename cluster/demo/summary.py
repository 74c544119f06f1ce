"""The end of the demo: what was seen, in words for somebody who met a KV cache an hour ago."""

from collections.abc import Mapping
from typing import Any

from cluster.demo.console import Screen
from cluster.demo.report import ScenarioResult


def print_summary(
    screen: Screen, results: Mapping[str, ScenarioResult], report: Mapping[str, Any]
) -> None:
    """A panel with a paragraph for each scenario, and the verdict over all."""
    lines = []
    for name, result in results.items():
        lines += [f"{name}: {result.summary()}", ""]
    lines.append(f"All of it took {report['wall_s']:.0f} seconds on {_machine(report)}.")
    screen.line()
    screen.panel("What you have seen", lines)
    failures = [text for found in report["failures"].values() for text in found]
    screen.verdict(not failures, "; ".join(failures) or "Every expectation was met")


def _machine(report: Mapping[str, Any]) -> str:
    hardware = report["hardware"]
    return f"{hardware['num_cpus']} CPUs ({hardware['cpu'] or hardware['machine']})"
