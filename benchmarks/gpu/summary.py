"""One file of the GPU benchmarks' headline figures, from the files that they wrote.

    python -m benchmarks.gpu.summary --of h200 --json benchmarks/results/h200.json \
        --table benchmarks/results/h200.md --picture docs/images/gpu.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.pictures import draw, table
from cluster.demo.report import write_json

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("link", "decode", "itl", "ttft", "ngram")


def read_parts(folder: Path, machine: str) -> dict[str, dict[str, Any]]:
    """What there is of `PARTS` for this machine, by name."""
    files = {part: folder / f"{part}-{machine}.json" for part in PARTS}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures; None for what was not measured."""
    link, ttft = parts["link"], parts["ttft"]
    decode, itl = parts["decode"]["decode"], parts["itl"]["itl"]
    return {
        "hardware": ttft["device"],
        "commit": ttft["commit"],
        "date": ttft["date"],
        "link_gb_s": {
            "h2d": round(link["gb_per_s"]["link_load"], 2),
            "d2h": round(link["gb_per_s"]["link_save"], 2),
        },
        "load_fraction_of_link": round(link["load_vs_link"], 3),
        "save_fraction_of_link": round(link["save_vs_link"], 3),
        "ttft_ms": ttft["ttft_ms"],
        "common_prefix_min": ttft["common_prefix_min"],
        "itl_p99_ratio": round(parts["itl"]["itl_p99_ratio"], 3),
        "itl_p99_ratio_of_copies": round(itl["loads"]["p99_ms"] / itl["device"]["p99_ms"], 3),
        "decode_ms": {batch: round(one["median_ms"], 2) for batch, one in decode.items()},
        "ngram_speedup": parts.get("ngram", {}).get("ngram_speedup"),
        "parts": {
            part: {key: one[key] for key in ("commit", "date")} for part, one in parts.items()
        },
    }


def main() -> None:
    """Read, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--of", default="h200", help="the machine in the files' names")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="write it as Markdown")
    parser.add_argument("--picture", type=Path, help="draw it")
    options = parser.parse_args()
    found = summary(read_parts(options.folder, options.of))
    print(json.dumps(found, indent=2))
    if options.json:
        write_json(found, options.json)
    if options.table:
        options.table.write_text(table(found))
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
