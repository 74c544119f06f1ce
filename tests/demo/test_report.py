"""The report: the issue's JSON shape, honest about failures and about the machine."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.engine import TokenChunk
from cluster.demo.console import Screen
from cluster.demo.report import build_report, draw_load_chart, write_json


@dataclass(frozen=True)
class Result:
    figures: dict[str, Any]
    found: list[str]

    def as_json(self) -> dict[str, Any]:
        return self.figures

    def failures(self) -> list[str]:
        return self.found


def mode(ttft_s: float) -> dict[str, Any]:
    tiers = {"device": 10, "host": 20, "shared": 30, "computed": 40}
    return {
        "ttft_p50_s": ttft_s,
        "ttft_p99_s": 2 * ttft_s,
        "tokens_per_s": 1 / ttft_s,
        "tokens_from": tiers,
    }


def test_report_names_figures_failures_and_machine(tmp_path: Path) -> None:
    results = {"share": Result({"matched": 1}, []), "load": Result({"none": {}}, ["it was slow"])}
    report = build_report(results, {"model": "tiny"}, 1.5)
    write_json(report, tmp_path / "new" / "report.json")
    read = json.loads((tmp_path / "new" / "report.json").read_text())
    assert read["scenario"] == {"share": {"matched": 1}, "load": {"none": {}}}
    assert read["ok"] is False
    assert read["failures"] == {"load": ["it was slow"]}
    assert read["hardware"]["num_cpus"] >= 1
    assert read["versions"]["torch"][0].isdigit()
    assert read["config"] == {"model": "tiny"}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.json"]


def test_report_is_ok_when_every_expectation_was_met() -> None:
    report = build_report({"share": Result({}, [])}, {}, 0.0)
    assert report["ok"] is True
    assert report["failures"] == {}


def test_chart_is_a_png(tmp_path: Path) -> None:
    file = tmp_path / "report" / "load.png"
    modes = {"none": mode(2.0), "local": mode(1.0), "shared": mode(0.5)}
    draw_load_chart(modes, {"none": "no reuse", "local": "alone", "shared": "shared"}, file)
    assert file.read_bytes().startswith(b"\x89PNG")


def drawn(terminal: bool) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out, force_terminal=terminal, width=100, highlight=False)), out


def test_accepted_drafts_are_coloured_on_a_terminal_only() -> None:
    for terminal in (True, False):
        screen, out = drawn(terminal)
        screen.chunk(TokenChunk((1,), "plain"))
        screen.chunk(TokenChunk((2, 3), "drafted", num_accepted=1))
        screen.chunk(TokenChunk((4, 5), "again", num_accepted=1))
        text = out.getvalue()
        if not terminal:
            assert text == "plaindraftedagain"
            continue
        assert text.startswith("plain\x1b[")
        before_first, before_second = text.split("drafted")[0], text.split("drafted")[1]
        assert before_first[-8:] != before_second.split("again")[0][-8:]


def test_steps_keep_their_brackets_and_progress_is_plain_in_a_pipe() -> None:
    screen, out = drawn(terminal=False)
    screen.step(1, "Creating first LLM instance...")
    with screen.progress("requests", 3) as advance:
        advance()
    screen.verdict(True, "Both outputs are identical!")
    screen.verdict(False, "they differ")
    lines = out.getvalue().splitlines()
    assert lines[0] == "[1] Creating first LLM instance..."
    assert lines[1] == "    requests: 3 done"
    assert lines[2] == "✓ SUCCESS: Both outputs are identical!"
    assert lines[3] == "✗ FAILED: they differ"
