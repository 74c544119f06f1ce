"""Pictures of a study: time to first token against load, one line for each rule."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.routing.cells import OURS, Cell
from benchmarks.routing.figures import Figures

TIER_COLOURS = {"device": "#2a9d8f", "host": "#8ab17d", "shared": "#e9c46a"}
TITLES = {"store": "device and a shared store", "host": "device and host memory, no store"}


def draw_load_curve(cells: Sequence[Cell], figures: Mapping[Cell, Figures], path: Path) -> None:
    """Mean time to first token against requests a second; a panel for each set of tiers."""
    tiers = list(dict.fromkeys(cell.tiers for cell in cells))
    picture = Figure(figsize=(5.6 * len(tiers), 4.4), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(1, len(tiers), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, tiers, strict=True):
        mine = [cell for cell in cells if cell.tiers == name]
        for rule in dict.fromkeys(cell.policy for cell in mine):
            points = sorted(
                (cell.rate, figures[cell].ttft_mean_s) for cell in mine if cell.policy == rule
            )
            style = {"linewidth": 2.6, "color": "black"} if rule == OURS else {"linewidth": 1.2}
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=rule, **style)
        panel.set_yscale("log")
        panel.set_xlabel("requests per second")
        panel.set_title(TITLES.get(name, name), fontsize=10)
        panel.grid(visible=True, which="both", alpha=0.25)
    panels[0].set_ylabel("mean time to first token, s")
    panels[-1].legend(fontsize=7)
    picture.savefig(path, dpi=130, metadata={"Software": None})


def draw_hit_rates(cells: Sequence[Cell], figures: Mapping[Cell, Figures], path: Path) -> None:
    """Where prompt tokens came from, a bar for each rule; a panel for each set of tiers."""
    tiers = list(dict.fromkeys(cell.tiers for cell in cells))
    picture = Figure(figsize=(5.6 * len(tiers), 3.6), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(1, len(tiers), sharex=True, squeeze=False)[0]
    for panel, name in zip(panels, tiers, strict=True):
        mine = [cell for cell in cells if cell.tiers == name]
        mine.sort(key=lambda cell: figures[cell].hit_rate)
        left = [0.0] * len(mine)
        for tier, colour in TIER_COLOURS.items():
            values = [100 * getattr(figures[cell], f"{tier}_rate") for cell in mine]
            names = [cell.policy for cell in mine]
            panel.barh(names, values, left=left, color=colour, label=tier)
            left = [a + b for a, b in zip(left, values, strict=True)]
        panel.set_xlabel("% of prompt tokens not computed")
        panel.set_title(TITLES.get(name, name), fontsize=10)
    panels[-1].legend(fontsize=7, loc="lower right")
    picture.savefig(path, dpi=130, metadata={"Software": None})
