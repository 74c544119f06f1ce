"""Every tier against the limits of this machine and against what others use, in one run.

All figures are ratios of medians (above 1: we are faster) except the times of calls, which move no
bytes. The rivals are installed by themselves, each into a virtual environment of its own.

    python -m benchmarks.store --json report/store.json
    python -m benchmarks.store --quick --only host,disk
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases.calls import measure_calls
from benchmarks.cases.comparisons import (
    Found,
    Setting,
    compare_disk,
    compare_host,
    compare_s3,
)
from benchmarks.cases.rounds import BLOCK_SIZES
from benchmarks.provenance import provenance
from cluster.demo.report import write_json

TARGETS = {
    "get_vs_memcpy": 0.9,
    "put_vs_memcpy": 0.65,
    "verified_get_vs_memcpy": 0.7,
    "get_vs_lmcache_local_cpu": 1.0,
    "put_vs_lmcache_local_cpu": 1.0,
    "put_vs_torch_save": 5.0,
    "get_vs_torch_save": 2.5,
    "put_vs_lmcache_disk": 4.0,
    "get_vs_lmcache_disk": 2.0,
    "cold_get_vs_o_direct": 0.8,
    "get_vs_s3fs": 1.3,
    "stage_calls_per_s": 2000.0,
}
MOST = {"stage_512_ms": 3.0, "match_us_per_block": 1.0}
"""Times: here less is better."""

Compare = Callable[[ExitStack, str, int, Setting], Found]

S3_SIZE = "1.25MiB"
S3_PART = 2
"""Objects of all rounds stay in memory, so there are fewer."""

SECTIONS = ("host", "disk", "s3", "calls")


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `num_bytes` of blocks are moved in a round."""

    num_bytes: int
    num_rounds: int
    num_tries: int
    call_seconds: float


FULL = Sizes(256 << 20, num_rounds=7, num_tries=200, call_seconds=5.0)
QUICK = Sizes(48 << 20, num_rounds=2, num_tries=20, call_seconds=0.5)


@dataclass
class Report:
    """The JSON document: the issue's keys, and beside them what they were measured from."""

    figures: dict[str, Any] = field(default_factory=dict)
    gb_per_s: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, section: str, size: str, found: Found) -> None:
        """S3 is measured with one size, which its key does not name."""
        if section == "s3":
            self.figures[section] = found.ratios
        else:
            self.figures.setdefault(section, {})[size] = found.ratios
        self.gb_per_s[f"{section} {size}"] = found.gb_per_s
        self.notes += [note for note in found.notes if note not in self.notes]

    def as_json(self, args: argparse.Namespace) -> dict[str, Any]:
        return {
            **self.figures,
            "gb_per_s": self.gb_per_s,
            "notes": self.notes,
            "missed": [name for name, _, target in self.lines() if target.startswith("MISSED")],
            **provenance(),
            "options": {"quick": args.quick, "only": args.only, "folder": str(args.folder)},
        }

    def lines(self) -> list[tuple[str, str, str]]:
        """Name, value and target of each figure."""
        return [
            (name, "-" if value is None else f"{value:.2f}", _verdict(name, value))
            for name, value in _flat(self.figures, "")
        ]


def measure(args: argparse.Namespace, folder: Path) -> Report:
    sizes, report = (QUICK if args.quick else FULL), Report()
    setting = Setting(folder, args.rounds or sizes.num_rounds, not args.no_rivals)
    say = Console(stderr=True).print
    for section, size, work in _comparisons(args.only):
        say(f"{section} {size} ...")
        with ExitStack() as stack:
            num_bytes = sizes.num_bytes // (S3_PART if section == "s3" else 1)
            found = work(stack, size, _num_blocks(num_bytes, BLOCK_SIZES[size]), setting)
        report.add(section, size, found)
    if "calls" in args.only:
        say("calls ...")
        report.figures.update(measure_calls(sizes.num_tries, sizes.call_seconds))
    return report


def _num_blocks(num_bytes: int, block_bytes: int) -> int:
    """A multiple of 16 blocks."""
    return max(16, num_bytes // block_bytes // 16 * 16)


def _comparisons(only: Sequence[str]) -> Iterator[tuple[str, str, Compare]]:
    for section, sizes, work in (
        ("host", list(BLOCK_SIZES), compare_host),
        ("disk", list(BLOCK_SIZES), compare_disk),
        ("s3", [S3_SIZE], compare_s3),
    ):
        if section in only:
            yield from ((section, size, work) for size in sizes)


def show(report: Report) -> None:
    table = Table(title="ratios of medians; above 1 we are faster")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("target")
    for name, value, verdict in report.lines():
        table.add_row(name, value, verdict, style="red" if verdict.startswith("MISSED") else "")
    speeds = Table(title="medians, GB/s")
    for column in ("case", "method", "put", "get"):
        speeds.add_column(column, justify="right" if column in ("put", "get") else "left")
    for case, methods in report.gb_per_s.items():
        for method, rates in methods.items():
            speeds.add_row(case, method, f"{rates['put']:.2f}", f"{rates['get']:.2f}")
    console = Console()
    console.print(table)
    if speeds.rows:
        console.print(speeds)
    for note in report.notes:
        console.print(f"note: {note}")


def _flat(figures: dict[str, Any], prefix: str) -> list[tuple[str, float | None]]:
    flat: list[tuple[str, float | None]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name} ")
        else:
            flat.append((prefix + name, value))
    return flat


def _verdict(name: str, value: float | None) -> str:
    key = name.rpartition(" ")[2]
    if key in MOST:
        text, is_met = f"<= {MOST[key]:g}", value is not None and value <= MOST[key]
    elif key in TARGETS:
        text, is_met = f">= {TARGETS[key]:g}", value is not None and value >= TARGETS[key]
    else:
        return ""
    return text if is_met else f"MISSED {text}"


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {SECTIONS}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run?")
    parser.add_argument("--rounds", type=int, help="that count, of each comparison")
    parser.add_argument("--no-rivals", action="store_true", help="install nothing")
    parser.add_argument("--only", type=_sections, default=SECTIONS, help=",".join(SECTIONS))
    parser.add_argument(
        "--folder", type=Path, default=Path.cwd(), help="on the disk to measure; default: here"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".store-benchmark-", dir=args.folder) as folder:
        report = measure(args, Path(folder))
    show(report)
    if args.json:
        write_json(report.as_json(args), args.json)


if __name__ == "__main__":
    main()
