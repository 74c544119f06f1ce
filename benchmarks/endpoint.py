"""What the way over HTTP costs, and whether the endpoint holds out when too much is asked of it.

    python -m benchmarks.endpoint --json benchmarks/results/endpoint-cpu.json

Four measurements on a local Ray, each with its own application:

* the time to first token over HTTP, Serve and the router, less that of a direct call on the same
  replica, one request at a time; also for a long prompt, less what its tokenising takes;
* requests per second with an engine that answers at once, beside what Ray Serve itself reaches
  with an empty FastAPI deployment in the same minute;
* tokens per second in streams through one ingress;
* a soak with the real embedded engine at 1.5 times what it can serve: errors other than 429,
  leases and slots that are left over, growth of the processes' memory.

Takes the minutes of the soak and about two more. The file holds the issue's figures and nothing
else; `--details` writes what they were made of, with the machine and the versions.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import endpoint_soak, endpoint_speed
from benchmarks.cases.endpoint_cluster import local_ray
from benchmarks.provenance import provenance
from cluster.demo.report import write_json

TARGET_ADDED_MS = 12.0
TARGET_REQUESTS_PER_S, TARGET_SHARE = 300.0, 0.7
TARGET_TOKENS_PER_S = 20_000.0


def main() -> int:
    """Measure, print, write; exit status 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--details", type=Path, help="file for what they were made of")
    parser.add_argument("--soak-minutes", type=float, default=10.0)
    parser.add_argument("--model", default="smollm2-135m", help="of the soak (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests, to try it")
    parsed = parser.parse_args()
    with local_ray():
        speed = asyncio.run(endpoint_speed.measure(10 if parsed.quick else 1))
        soak = asyncio.run(endpoint_soak.measure(parsed.soak_minutes * 60, parsed.model))
    figures = {**speed.figures, "soak": soak.figures}
    missed = _missed(figures)
    _show(figures, missed)
    if parsed.json:
        write_json(figures, parsed.json)
    if parsed.details:
        details = {"speed": speed.details, "soak": soak.details}
        write_json({**provenance(), **figures, **details, "missed": missed}, parsed.details)
    return 1 if missed else 0


def _missed(figures: dict[str, Any]) -> list[str]:
    """The targets that were not reached."""
    ceiling = figures["serve_ceiling_requests_per_s"]
    wanted = min(TARGET_REQUESTS_PER_S, TARGET_SHARE * ceiling)
    soak = figures["soak"]
    reached = {
        f"added_ttft_ms_median <= {TARGET_ADDED_MS:g}": (
            figures["added_ttft_ms_median"] <= TARGET_ADDED_MS
        ),
        f"requests_per_s >= {wanted:.0f}": figures["requests_per_s"] >= wanted,
        f"stream_tokens_per_s >= {TARGET_TOKENS_PER_S:g}": (
            figures["stream_tokens_per_s"] >= TARGET_TOKENS_PER_S
        ),
        "soak without errors": soak["errors_other_than_429"] == 0,
        "soak without leaks": soak["leaked_leases"] == soak["leaked_slots"] == 0,
    }
    return [name for name, is_reached in reached.items() if not is_reached]


def _show(figures: dict[str, Any], missed: list[str]) -> None:
    table = Table("figure", "value", title="The endpoint")
    for name, value in figures.items():
        for inner, one in value.items() if isinstance(value, dict) else ((None, value),):
            table.add_row(f"{name}.{inner}" if inner else name, f"{one:,}")
    Console().print(table)
    for name in missed:
        print(f"missed: {name}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
