"""The figures of a study as tables, on a terminal or for a page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from benchmarks.routing.cells import Cell
from benchmarks.routing.figures import Figures

COLUMNS = (
    "rule",
    "TTFT mean",
    "p50",
    "p99",
    "device",
    "host",
    "shared",
    "imbalance",
    "KV pinned",
    "shed",
    "error",
)


def title_of(cell: Cell) -> str:
    """What a cell is, but for its rule."""
    parts = [
        f"{cell.workload}, {cell.num_replicas} replicas, {cell.tiers}",
        f"{cell.rate:g} requests/s for {cell.duration_s:g} s, seed {cell.seed}",
    ]
    if cell.delay_s:
        parts.append(f"events {cell.delay_s:g} s late")
    if cell.lost_share:
        parts.append(f"{cell.lost_share:.0%} of events lost")
    if cell.deaths:
        parts.append(f"{len(cell.deaths)} replicas die")
    if cell.autoscale is not None:
        parts.append(f"autoscaling up to {cell.autoscale.max_replicas}")
    if cell.max_pending is not None:
        parts.append(f"at most {cell.max_pending} pending per replica")
    if cell.num_shards > 1:
        parts.append(f"{cell.num_shards} routers")
    return "; ".join(parts)


def groups(figures: Mapping[Cell, Figures]) -> dict[str, list[tuple[str, Figures]]]:
    """By title: the rules that ran it, in the order of their means."""
    found: dict[str, list[tuple[str, Figures]]] = {}
    for cell, one in figures.items():
        found.setdefault(title_of(replace(cell, policy="")), []).append((cell.policy, one))
    return {
        title: sorted(rows, key=lambda row: row[1].ttft_mean_s) for title, rows in found.items()
    }


def row_of(rule: str, one: Figures) -> tuple[str, ...]:
    """One line of a table, in the order of `COLUMNS`."""
    return (
        rule,
        f"{one.ttft_mean_s:.3f} s",
        f"{one.ttft_p50_s:.3f}",
        f"{one.ttft_p99_s:.1f}",
        f"{one.device_rate:.1%}",
        f"{one.host_rate:.1%}",
        f"{one.shared_rate:.1%}",
        f"{one.queue_imbalance_s:.1f} s",
        f"{one.pinned_share:.0%}",
        f"{one.shed_rate:.1%}",
        f"{one.prediction_error_s:.3f} s",
    )


def print_tables(figures: Mapping[Cell, Figures], console: Console) -> None:
    """A table for each title; means, rates of prompt tokens, and the error of predictions."""
    for title, rows in groups(figures).items():
        table = Table(*COLUMNS, title=title, title_justify="left")
        for rule, one in rows:
            table.add_row(*row_of(rule, one))
        console.print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
