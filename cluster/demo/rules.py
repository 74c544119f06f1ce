"""The comparison of routing rules on a running cluster: the table.

Where replicas are alone, a rule decides what is computed again; where they share a cache, only what
two of them compute at the same time, and what waits where.
"""

from collections.abc import Mapping
from typing import Protocol

from cluster.demo.console import Screen

PLACES = {"alone": "alone", "shared": "shared cache"}


class RunFigures(Protocol):
    """What is shown of one run."""

    @property
    def ttft_p50_s(self) -> float:
        """Median time to first token in seconds."""

    @property
    def ttft_p90_s(self) -> float:
        """The time to first token that 9 of 10 requests do not exceed, in seconds."""

    @property
    def prefill_tokens_computed(self) -> int:
        """Prompt tokens that no cache had."""


def print_rules(screen: Screen, rules: Mapping[str, Mapping[str, RunFigures]]) -> None:
    """One row for each rule and place; the first rule's is what the others are compared with."""
    rows = [
        (
            rule,
            PLACES[place],
            str(run.prefill_tokens_computed),
            f"{run.ttft_p50_s:.2f} s",
            f"{run.ttft_p90_s:.2f} s",
        )
        for place in PLACES
        for rule, run in ((rule, places[place]) for rule, places in rules.items())
    ]
    columns = ("Rule", "Replicas", "computed", "TTFT p50", "p90")
    screen.table("The same traffic under each routing rule", columns, rows)
