"""Which cells are run: rules, loads, seeds, sizes, faults; and the figures the issue asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.routing import POLICY_NAMES
from benchmarks.routing.autoscaler import Autoscale
from benchmarks.routing.cells import OURS, Cell, of_rules
from benchmarks.routing.figures import Figures

RIVALS = tuple(name for name in POLICY_NAMES if name != OURS)
STRONG = ("llm_d", "llm_d_chart", "conductor", "dynamo")
"""The best rules at 16 replicas: they run with every seed, all but the last at larger sizes."""
SHOWN = (OURS, "llm_d", "conductor", "dynamo", "sglang", "prefix_first", "least_outstanding")
MAIN_TIERS = ("store", "host")
LOADS = (12.3, 15.4, 17.4, 19.5, 20.0)
"""Requests a second of the conversation trace for 16 replicas: 60, 75, 85, 95 and 97.5 % of what a
store allows with a p90 of 5 s."""
SIZES = {64: (76.0, 900.0), 256: (304.0, 240.0)}
"""Replicas: requests a second, and how long."""
GENERATED = {"chat": 50.0, "documents": 32.0, "agents": 38.0, "mixed": 30.0}
"""Requests a second for 16 replicas: near what KV memory allows."""


@dataclass(frozen=True, slots=True)
class Study:
    """Named lists of cells; one may be in several."""

    seeds: Sequence[int]
    main: list[Cell] = field(default_factory=list)
    weak: list[Cell] = field(default_factory=list)
    curve: list[Cell] = field(default_factory=list)
    sizes: list[Cell] = field(default_factory=list)
    late: list[Cell] = field(default_factory=list)
    lost: list[Cell] = field(default_factory=list)
    other: list[Cell] = field(default_factory=list)

    @property
    def cells(self) -> list[Cell]:
        """All of them, what matters most first."""
        parts = (self.main, self.late, self.lost, self.sizes, self.weak, self.curve, self.other)
        return [cell for part in parts for cell in part]


def full_study(trace: str | None) -> Study:
    """Everything; `trace` is the name of the workload that stands for production, if any."""
    study = Study(seeds=(1, 2, 3, 4, 5))
    for tiers in MAIN_TIERS:
        if trace is not None:
            _add_trace(study, Cell(OURS, tiers, trace))
        for name, rate in GENERATED.items():
            cell = Cell(OURS, tiers, name, rate=rate, duration_s=300.0)
            study.other.extend(of_rules(cell, (OURS, *STRONG, "least_outstanding")))
    base = Cell(OURS, "host", trace or "mixed", rate=19.5 if trace else GENERATED["mixed"])
    _add_changes(study, base)
    if trace is not None:
        study.other.extend(of_rules(replace(base, tiers="host+store"), (OURS, *STRONG)))
        study.other.extend(of_rules(replace(base, tiers="slow store", rate=17.4), (OURS, *STRONG)))
        large = replace(base, tiers="store", num_replicas=1000, rate=1187.5, duration_s=40.0)
        study.other.extend(of_rules(large, (OURS, "least_outstanding")))
        study.other.extend(replace(large, num_shards=count) for count in (4, 16))
    return study


def quick_study(trace: str | None) -> Study:
    """Two minutes: short runs of some rules with one seed; good to see that all works."""
    study = Study(seeds=(1,))
    name, rate = (trace, 19.5) if trace else ("mixed", GENERATED["mixed"])
    for tiers in MAIN_TIERS:
        cell = Cell(OURS, tiers, name, rate=rate, duration_s=300.0)
        study.main.extend(of_rules(cell, (OURS, "llm_d", "conductor", "least_outstanding")))
        study.late.append(replace(cell, delay_s=5.0))
        study.lost.append(replace(cell, lost_share=0.01))
    return study


def _add_trace(study: Study, cell: Cell) -> None:
    study.weak.extend(of_rules(cell, [name for name in RIVALS if name not in STRONG]))
    for seed in study.seeds:
        study.main.extend(of_rules(replace(cell, seed=seed), (OURS, *STRONG)))
    for seed in study.seeds:
        study.late.append(replace(cell, seed=seed, delay_s=5.0))
        study.lost.append(replace(cell, seed=seed, lost_share=0.01))
    study.other.append(replace(cell, delay_s=30.0))
    for rate in LOADS:
        study.curve.extend(of_rules(replace(cell, rate=rate), SHOWN))
    for num_replicas, (rate, duration_s) in SIZES.items():
        large = replace(cell, num_replicas=num_replicas, rate=rate, duration_s=duration_s)
        study.sizes.extend(of_rules(large, (OURS, "llm_d", "llm_d_chart", "conductor")))


def _add_changes(study: Study, base: Cell) -> None:
    """Replicas that die, are added and removed; refusals."""
    deaths = ((400.0, "replica-0003"), (500.0, "replica-0007"))
    study.other.extend(of_rules(replace(base, deaths=deaths, rate=0.8 * base.rate), SHOWN[:4]))
    growing = replace(base, num_replicas=8, surge_at_s=450.0, autoscale=Autoscale(8, 24))
    study.other.extend(of_rules(growing, SHOWN[:4]))
    refusing = replace(base, rate=1.3 * base.rate, max_pending=8)
    study.other.extend(of_rules(refusing, SHOWN[:4]))


def answers(study: Study, figures: Mapping[Cell, Figures]) -> dict[str, Any]:
    """What the issue asks for, in its shape; what was not run is not there."""
    cells = [*study.main, *study.weak, *study.sizes]
    found: dict[str, Any] = {}
    for size in dict.fromkeys(str(cell.num_replicas) for cell in cells):
        for tiers in MAIN_TIERS:
            mine = [c for c in cells if str(c.num_replicas) == size and c.tiers == tiers]
            if len({cell.policy for cell in mine}) > 1:
                found.setdefault(size, {})[tiers] = _comparison(mine, figures)
    result: dict[str, Any] = {"conversation" if _has_trace(study) else "generated": found}
    for name, part in (("late_5s_ratio", study.late), ("lost_1pct_ratio", study.lost)):
        ratios = _fault_ratios(part, figures)
        if ratios:
            result[name] = max(ratios.values())
            result[f"{name}s"] = ratios
    return result


def _has_trace(study: Study) -> bool:
    return any(cell.workload not in GENERATED for cell in study.cells)


def _comparison(cells: Sequence[Cell], figures: Mapping[Cell, Figures]) -> dict[str, Any]:
    """Ours against the best rule that ran with every seed, by the mean over the seeds."""
    seeds = sorted({cell.seed for cell in cells})
    runs = {(cell.policy, cell.seed): figures[cell] for cell in cells}
    rules = [rule for rule in POLICY_NAMES if all((rule, seed) in runs for seed in seeds)]
    means = {
        rule: sum(runs[rule, seed].ttft_mean_s for seed in seeds) / len(seeds) for rule in rules
    }
    best = min((rule for rule in rules if rule != OURS), key=lambda rule: means[rule])
    p99_s = [runs[OURS, seed].ttft_p99_s for seed in seeds]
    return {
        "ours_mean_s": means[OURS],
        "ours_p99_s": sum(p99_s) / len(p99_s),
        "best_rival": best,
        "best_rival_mean_s": means[best],
        "mean_s": dict(sorted(means.items(), key=lambda item: item[1])),
        "seeds": {
            str(seed): {rule: runs[rule, seed].ttft_mean_s for rule in rules} for seed in seeds
        },
    }


def _fault_ratios(part: Sequence[Cell], figures: Mapping[Cell, Figures]) -> dict[str, float]:
    """By tiers: mean time to first token with the fault to that without, over the seeds."""
    ratios = {}
    for tiers in dict.fromkeys(cell.tiers for cell in part):
        mine = [cell for cell in part if cell.tiers == tiers]
        sound = [replace(cell, delay_s=0.0, lost_share=0.0) for cell in mine]
        total_s = sum(figures[cell].ttft_mean_s for cell in mine)
        ratios[tiers] = total_s / sum(figures[cell].ttft_mean_s for cell in sound)
    return ratios
