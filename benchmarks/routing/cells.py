"""One cell of a study: which trace, tiers, rule, load and faults; and how cells are run."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from actors.routing.shards import shard_of
from benchmarks.routing.autoscaler import Autoscale
from benchmarks.routing.figures import Figures, summarise
from benchmarks.routing.hardware import Hardware
from benchmarks.routing.knowledge import EventFaults
from benchmarks.routing.scenario import Scenario, merged
from benchmarks.routing.simulation import Simulation
from benchmarks.routing.workload import Arrival, Workload

OURS = "least_cost"
WARM_UP_SHARE = 0.4
TIERS = {
    "store": Hardware(store_tokens=8_000_000),
    "host": Hardware(host_tokens=3_200_000),
    "host+store": Hardware(host_tokens=3_200_000, store_tokens=8_000_000),
    "slow store": Hardware(store_tokens=8_000_000, store_bytes_s=2.5e9),
    "device": Hardware(),
}
"""Per replica: a host tier of 8 times the device, a store at 10 GB/s (or 2.5) per network card."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. `surge_at_s`: before it only half of the sessions ask.

    With `num_shards` routers each has its own sessions and its own part of the replicas.
    """

    policy: str
    tiers: str = "store"
    workload: str = "conversation"
    num_replicas: int = 16
    rate: float = 19.5
    duration_s: float = 900.0
    seed: int = 1
    delay_s: float = 0.0
    lost_share: float = 0.0
    deaths: tuple[tuple[float, str], ...] = ()
    surge_at_s: float | None = None
    autoscale: Autoscale | None = None
    max_pending: int | None = None
    num_shards: int = 1


def scenario_of(cell: Cell) -> Scenario:
    """What is simulated for a cell."""
    return Scenario(
        policy=cell.policy,
        num_replicas=cell.num_replicas,
        hardware=TIERS[cell.tiers],
        seed=cell.seed,
        warm_up_s=WARM_UP_SHARE * cell.duration_s,
        faults=EventFaults(cell.delay_s, cell.lost_share),
        deaths=cell.deaths,
        autoscale=cell.autoscale,
        max_pending=cell.max_pending,
    )


def arrivals_of(cell: Cell, workload: Workload) -> list[Arrival]:
    """The requests of a cell: the same for every rule."""
    arrivals = workload.arrivals(cell.rate, cell.duration_s, cell.seed)
    surge_s = cell.surge_at_s
    if surge_s is None:
        return arrivals
    return [one for one in arrivals if one.at_s >= surge_s or one.session % 2]


def run_cell(cell: Cell, workloads: Mapping[str, Workload]) -> Figures:
    """The figures of one cell."""
    arrivals = arrivals_of(cell, workloads[cell.workload])
    if cell.num_shards == 1:
        return summarise(Simulation(scenario_of(cell), arrivals).run())
    shards: list[list[Arrival]] = [[] for _ in range(cell.num_shards)]
    for one in arrivals:
        shards[shard_of(str(one.session), cell.workload, cell.num_shards)].append(one)
    scenario = scenario_of(replace(cell, num_replicas=cell.num_replicas // cell.num_shards))
    return summarise(merged([Simulation(scenario, shard).run() for shard in shards]))


_workloads: Mapping[str, Workload] = {}
"""Of this process; workers inherit it when they are forked."""


def _run(cell: Cell) -> tuple[Cell, Figures]:
    return cell, run_cell(cell, _workloads)


def run_cells(
    cells: Sequence[Cell],
    workloads: Mapping[str, Workload],
    num_processes: int,
    on_done: Callable[[Cell, Figures], None],
    journal: Path | None = None,
) -> dict[Cell, Figures]:
    """All cells, each once, in several processes; the result does not depend on their number.

    What is in `journal` is taken from there, and what is run is added to it.
    """
    global _workloads
    _workloads = workloads
    wanted = list(dict.fromkeys(cells))
    done = _read_journal(journal)
    found = {cell: done[repr(cell)] for cell in wanted if repr(cell) in done}
    missing = [cell for cell in wanted if cell not in found]
    with _mapper(num_processes) as mapped:
        for cell, figures in mapped(_run, missing):
            found[cell] = figures
            on_done(cell, figures)
            if journal is not None:
                with journal.open("a") as lines:
                    lines.write(json.dumps([repr(cell), asdict(figures)]) + "\n")
    return {cell: found[cell] for cell in wanted}


@contextmanager
def _mapper(num_processes: int) -> Iterator[Callable[..., Iterable[tuple[Cell, Figures]]]]:
    """`map`, in so many processes; what is done first comes first."""
    if num_processes == 1:
        yield map
        return
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        yield pool.imap_unordered


def _read_journal(journal: Path | None) -> dict[str, Figures]:
    if journal is None or not journal.exists():
        return {}
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return {name: Figures(**figures) for name, figures in entries}


def of_rules(cell: Cell, rules: Sequence[str]) -> list[Cell]:
    """The same cell for each rule."""
    return [replace(cell, policy=rule) for rule in rules]
