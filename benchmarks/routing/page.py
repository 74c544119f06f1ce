"""The page of results, made from the figures of a study: `docs/routing-results.md`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.routing.cells import Cell
from benchmarks.routing.figures import Figures
from benchmarks.routing.tables import COLUMNS, groups, markdown, row_of

HEAD = """# Routing rules compared, in simulation

Made by `make bench-routing ARGS="--trace FILE --page docs/routing-results.md"`; do not edit.
Every figure is of a model of an H100 with an 8B model, none is a measurement on a GPU; how the
model works and what it leaves out is in [routing.md](routing.md). Times are means over all requests
after a warm-up of 40 %. Rates are parts of the prompt tokens.
"""


def page(
    result: Mapping[str, Any], figures: Mapping[Cell, Figures], pictures: Sequence[str]
) -> str:
    """The whole page."""
    lines = [HEAD]
    name = "conversation" if "conversation" in result else "generated"
    lines += ["## Ours and the best of the others", "", *_headline(result[name]), ""]
    lines += [*_seeds(result[name]), *_faults(result)]
    lines += [f"![{one}](images/{one})\n" for one in pictures]
    lines += ["## All runs", ""]
    for title, rows in groups(figures).items():
        lines += [f"**{title}**", "", *markdown(COLUMNS, [row_of(*row) for row in rows]), ""]
    return "\n".join(lines)


def _headline(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            size,
            tiers,
            f"**{one['ours_mean_s']:.3f} s**",
            f"{one['ours_p99_s']:.1f} s",
            one["best_rival"],
            f"{one['best_rival_mean_s']:.3f} s",
            f"{one['ours_mean_s'] / one['best_rival_mean_s'] - 1:+.1%}",
        )
        for size, both in found.items()
        for tiers, one in both.items()
        if one
    ]
    columns = ("replicas", "tiers", "ours, mean", "p99", "best rival", "its mean", "ours to it")
    yield from markdown(columns, rows)


def _seeds(found: Mapping[str, Any]) -> Iterator[str]:
    """Each seed's means, where there are several."""
    for size, both in found.items():
        for tiers, one in both.items():
            if len(one.get("seeds", ())) < 2:
                continue
            rules = [
                rule for rule in one["mean_s"] if all(rule in s for s in one["seeds"].values())
            ]
            rows = [
                (rule, *(f"{seed[rule]:.3f}" for seed in one["seeds"].values())) for rule in rules
            ]
            yield f"Mean time to first token by seed, {size} replicas, {tiers}:\n"
            yield from markdown(("rule", *one["seeds"]), rows)
            yield ""


def _faults(result: Mapping[str, Any]) -> Iterator[str]:
    for key, what in (
        ("late_5s_ratios", "cache events 5 s late"),
        ("lost_1pct_ratios", "1 % of the batches of events lost, never repaired"),
    ):
        if key in result:
            ratios = ", ".join(f"{tiers} {ratio - 1:+.1%}" for tiers, ratio in result[key].items())
            yield f"Ours with {what}: {ratios} of mean time to first token.\n"
