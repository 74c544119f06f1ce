"""Compares routing rules on a trace, in simulation.

    make bench-routing ARGS="--trace conversation_trace.jsonl"
    make bench-routing ARGS="--quick"

A trace is a file in Mooncake's format; without one only generated traffic is used. The same
arguments give the same figures to the last digit, whatever the machine and number of processes.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.provenance import provenance
from benchmarks.routing.cells import Cell, run_cells
from benchmarks.routing.figures import Figures
from benchmarks.routing.page import page
from benchmarks.routing.pictures import draw_hit_rates, draw_load_curve
from benchmarks.routing.study import GENERATED, Study, answers, full_study, quick_study
from benchmarks.routing.tables import print_tables, title_of
from benchmarks.routing.workload import Workload
from benchmarks.traces import GeneratedTraffic, read_trace
from cluster.demo.report import write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
MIXES = {"chat": (1, 0, 0), "documents": (0, 1, 0), "agents": (0, 0, 1), "mixed": (6, 3, 1)}
TRACE_JITTER_S = 3.0
"""The published conversation trace gives its times in steps of three seconds."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a usage text when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    trace = os.environ.get("KVCOMMONS_TRACE")
    add("--trace", type=Path, default=trace, help="JSONL in Mooncake's format ($KVCOMMONS_TRACE)")
    add("--quick", action="store_true", help="short runs of few rules, two minutes")
    add("--json", type=Path, default=None, help="default: benchmarks/results/routing.json")
    add("--pictures", type=Path, default=Path("report"), help="folder (default: report)")
    add("--page", type=Path, help="write a page with all tables here")
    add("--journal", type=Path, help="go on after an interruption: keep and take runs here")
    add("--processes", type=int, default=2, help="default: 2")
    return parser.parse_args(arguments)


def read_workloads(trace: Path | None) -> dict[str, Workload]:
    """The generated workloads, and the trace, if any, as `conversation`."""
    found = {}
    for name in GENERATED:
        traffic = GeneratedTraffic(seed=7, num_sessions=2000, hours=0.5, mix=MIXES[name])
        found[name] = Workload(name, traffic.requests())
    if trace is not None:
        found["conversation"] = Workload("conversation", read_trace(trace), TRACE_JITTER_S)
    return found


def report(
    study: Study, figures: Mapping[Cell, Figures], trace: Path | None, wall_s: float
) -> dict[str, Any]:
    """What the issue asks for, the router's own speed if it was measured, and every figure."""
    speed = RESULTS / "routing-decisions.json"
    measured = json.loads(speed.read_text()) if speed.exists() else {}
    keys = ("decision_us", "decisions_per_s")
    return {
        **answers(study, figures),
        **{key: measured[key] for key in keys if key in measured},
        "trace": trace.name if trace else "generated",
        "wall_s": wall_s,
        **provenance(),
        "cells": [
            {"cell": title_of(cell), **asdict(cell), **asdict(one)} for cell, one in figures.items()
        ],
    }


def draw(study: Study, figures: Mapping[Cell, Figures], folder: Path) -> list[str]:
    """The pictures of what was run; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    if study.curve:
        names.append("routing-load.png")
        draw_load_curve(study.curve, figures, folder / names[-1])
    cells = [*study.main, *study.weak]
    first = [cell for cell in cells if cell.seed == study.seeds[0]]
    if first:
        names.append("routing-hits.png")
        draw_hit_rates(first, figures, folder / names[-1])
    return names


def main() -> None:
    """Run the study; tables, pictures and the JSON file."""
    options = parse_arguments()
    console = Console(width=None if os.isatty(1) else 132)
    if options.trace is None:
        console.print("No --trace given: generated traffic only, without the issue's figures.")
    workloads = read_workloads(options.trace)
    name = "conversation" if options.trace else None
    study = quick_study(name) if options.quick else full_study(name)
    num_cells = len(set(study.cells))
    started_s = time.perf_counter()

    def on_done(cell: Cell, one: Figures) -> None:
        passed_s = time.perf_counter() - started_s
        console.print(
            f"{passed_s:6.0f} s  {cell.policy:18} {one.ttft_mean_s:9.3f} s  {title_of(cell)}",
            style="dim",
            highlight=False,
        )

    console.print(f"{num_cells} runs in {options.processes} processes ...")
    cells = study.cells
    figures = run_cells(cells, workloads, options.processes, on_done, options.journal)
    print_tables(figures, console)
    result = report(study, figures, options.trace, time.perf_counter() - started_s)
    quiet = {key: value for key, value in result.items() if key != "cells"}
    console.print_json(data=quiet)
    pictures = draw(study, figures, options.pictures)
    if options.page:
        options.page.write_text(page(result, figures, pictures))
    default = Path("report/routing-quick.json") if options.quick else RESULTS / "routing.json"
    write_json(result, options.json or default)


if __name__ == "__main__":
    main()
