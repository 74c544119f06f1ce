"""The GPU benchmarks' headline as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SOURCES = {
    "cold": ("computed", "#6c757d"),
    "shared_cold_disk": ("shared tier, cold disk", "#e76f51"),
    "shared_page_cache": ("shared tier, page cache", "#e9c46a"),
    "host": ("host memory, from another replica", "#2a9d8f"),
    "device": ("on the device", "#264653"),
}
"""Where a prompt's prefix comes from: its title and colour, slowest first."""


def table(found: Mapping[str, Any]) -> str:
    """`h200.json` as Markdown: what was measured, on what, when and of which commit."""
    lengths = found["ttft_ms"]
    lines = [
        f"# {found['hardware']}",
        "",
        "Made by `python -m benchmarks.gpu.summary`; targets and why they are missed: docs/gpu.md.",
        "",
        "| first token, ms | " + " | ".join(f"{int(one):,} tokens" for one in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for source, (title, _) in SOURCES.items():
        cells = [f"{one[source]:,.0f}" if source in one else "" for one in lengths.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    link = found["link_gb_s"]
    speedup = found["ngram_speedup"]
    figures = {
        "link to the device and from it, GB/s": f"{link['h2d']:.1f}, {link['d2h']:.1f}",
        "loads and saves of the worker, of the link": (
            f"{found['load_fraction_of_link']:.2f}, {found['save_fraction_of_link']:.2f}"
        ),
        "decoding step by batch, ms": ", ".join(
            f"{batch}: {milliseconds:.1f}" for batch, milliseconds in found["decode_ms"].items()
        ),
        "p99 between tokens beside loads, over alone": f"{found['itl_p99_ratio']:.2f}",
        "the same, over beside prompts on the device": f"{found['itl_p99_ratio_of_copies']:.2f}",
        "n-gram drafts, times as many tokens/s": "not measured"
        if speedup is None
        else f"{speedup:.1f}",
    }
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in figures.items())]
    lines += ["", "| part | commit | date |", "|---|---|---|"]
    lines += [
        f"| {part} | {one['commit']} | {one['date']} |" for part, one in found["parts"].items()
    ]
    return "\n".join([*lines, ""])


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Milliseconds to the first token against the prompt's length, a line for each source."""
    picture = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(picture)
    panel = picture.subplots()
    lengths = [int(length) for length in found["ttft_ms"]]
    for source, (title, colour) in SOURCES.items():
        points = [one.get(source) for one in found["ttft_ms"].values()]
        panel.plot(lengths, points, marker="o", color=colour, label=title)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
    panel.set_xlabel("prompt tokens")
    panel.set_ylabel("ms to the first token")
    panel.set_title(f"Llama-3.1-8B's shape in bfloat16, {found['hardware']}", fontsize=10)
    panel.grid(visible=True, which="both", alpha=0.25)
    panel.legend(fontsize=8)
    picture.savefig(path, dpi=130, metadata={"Software": None})
