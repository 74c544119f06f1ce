"""`kvcommons cache bench`: how fast this machine and this store can be, and how near we come.

It prevents two mistakes: blaming the cache for a slow disk, and a slow cache going unnoticed on a
fast one. Everything is measured in turns, so that other programs' load hits all rows alike, and the
rows of our own paths are shown as parts of the limit that holds for them.
"""

import argparse
import platform
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table

from cluster.bench_arena import bench_host
from cluster.bench_routes import Blocks, Route, disk_routes, memory_routes, store_routes
from cluster.cache_target import add_store, progress, show, whole_store
from shared_cache.errors import ConfigError
from shared_cache.media.io_errors import writing
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.stores.fs_store import open_store
from shared_cache.upkeep.whole_store import WholeStore

LAYOUTS = {
    "720KiB": BlockLayout(30, 2, 3, 32, 64, "bfloat16"),  # SmolLM2-135M
    "1.25MiB": BlockLayout(80, 2, 1, 32, 128, "bfloat16"),  # Llama-70B, one of 8 shards
    "4MiB": BlockLayout(32, 2, 8, 32, 128, "bfloat16"),  # Llama-3.1-8B
}

Rates = dict[str, float]
"""GB/s (1e9 bytes) by route."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured; `longest_s` ends the rounds of a block size early, after the first."""

    num_bytes: int
    num_rounds: int
    longest_s: float


FULL = Plan(256 << 20, 5, 17.0)
QUICK = Plan(48 << 20, 3, 2.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cache bench`."""
    add_store(parser)
    parser.add_argument("--quick", action="store_true", help="less data, in less than 15 seconds")
    parser.add_argument("--json", dest="as_json", action="store_true", help="for programs")


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print; exit status 0. What it wrote is removed in the end."""
    whole, plan = whole_store(arguments), QUICK if arguments.quick else FULL
    results: dict[str, Rates] = {}
    limits: dict[str, str | None] = {}
    with progress("measuring", len(LAYOUTS)) as advance:
        for label, layout in LAYOUTS.items():
            results[label], limits = measure(whole, layout, plan)
            advance(1)
    data = as_data(results, limits, whole.url) if arguments.as_json else None
    text = f"\nGB/s in {whole.url}; in brackets: part of the limit that is named behind the slash"
    show(data, as_table(results, limits), text)
    return 0


def measure(
    whole: WholeStore, layout: BlockLayout, plan: Plan
) -> tuple[Rates, dict[str, str | None]]:
    """The rates of all routes for one block size, and the limit of each route."""
    namespace = Namespace("bench", secrets.token_hex(16), "bench", layout)
    blocks = Blocks(namespace, max(8, plan.num_bytes // layout.block_bytes))
    store, recycling = (
        open_store(whole.url, namespace, whole.options, spare_bytes=spare_bytes)
        for spare_bytes in (0, 2 * blocks.num_bytes)
    )
    try:
        if store.read_only:
            raise ConfigError(f"{whole.url} may only be read: bench needs to write to it")
        with bench_host(namespace, blocks.num_bytes) as host, writing(whole.url):
            folder = whole.local_folder(namespace)
            disk = [] if folder is None else disk_routes(blocks, f"{folder}/bench.scratch")
            ours = store_routes(blocks, store, recycling, folder)
            routes = [*memory_routes(blocks, host), *disk, *ours]
            times_s = run_rounds(blocks, routes, plan)
    finally:
        for one in (store, recycling):
            one.close()
        if not store.read_only:
            whole.remove(namespace)
    rates = {
        name: blocks.num_bytes / statistics.median(some) / 1e9 for name, some in times_s.items()
    }
    limits = {route.name: route.limit for route in routes}
    return rates, {name: limit if limit in rates else None for name, limit in limits.items()}


def run_rounds(blocks: Blocks, routes: Sequence[Route], plan: Plan) -> dict[str, list[float]]:
    """Seconds of every route, one for each round; the first round warms up and is not counted.

    Raises `KvcommonsError` for a route whose bytes have not arrived.
    """
    times_s: dict[str, list[float]] = {route.name: [] for route in routes}
    end_s = time.perf_counter() + plan.longest_s
    for number in range(plan.num_rounds + 1):
        for route in routes:
            route.prepare()
            start_s = time.perf_counter()
            route.move()
            seconds = time.perf_counter() - start_s
            if number:
                times_s[route.name].append(seconds)
            elif route.fills_pool:
                blocks.check_pool(route.name)
        if number and time.perf_counter() > end_s:
            break
    return times_s


def as_data(
    results: dict[str, Rates], limits: dict[str, str | None], url: str
) -> dict[str, object]:
    """What `--json` prints."""
    sizes = {
        label: {
            name: {"gb_per_s": rate, "of_limit": _part(rates, limits, name)}
            for name, rate in rates.items()
        }
        for label, rates in results.items()
    }
    return {"store": url, "machine": platform.machine(), "limits": limits, "sizes": sizes}


def as_table(results: dict[str, Rates], limits: dict[str, str | None]) -> Table:
    """One row for every route, one column for every block size."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("")
    for label in results:
        table.add_column(label, justify="right")
    for name, limit in limits.items():
        cells = (_cell(rates[name], _part(rates, limits, name)) for rates in results.values())
        table.add_row(f"{name} / {limit}" if limit else name, *cells)
    return table


def _part(rates: Rates, limits: dict[str, str | None], name: str) -> float | None:
    limit = limits[name]
    return None if limit is None else rates[name] / rates[limit]


def _cell(rate: float, part: float | None) -> str:
    return f"{rate:.2f}" if part is None else f"{rate:.2f} ({part:.2f})"
