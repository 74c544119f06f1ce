"""The study's answers in the issue's shape, its page, and runs that go on after an interruption."""

from dataclasses import replace

import pytest

from benchmarks.routing.cells import OURS, Cell, run_cells
from benchmarks.routing.figures import Figures
from benchmarks.routing.page import page
from benchmarks.routing.pictures import draw_hit_rates, draw_load_curve
from benchmarks.routing.study import answers, full_study, quick_study
from benchmarks.routing.workload import Workload
from benchmarks.traces import GeneratedTraffic

SOME = Figures(100, 1.0, 0.5, 2.0, 9.0, 0.1, 0.2, 0.0, 0.0, 3.0, 0.6, 0.5, 0.1)


def made_up(study) -> dict[Cell, Figures]:
    """Ours takes 1 s, the others more by the length of their names; faults cost 2 %."""
    found = {}
    for cell in study.cells:
        mean_s = 1.0 if cell.policy == OURS else 1.0 + len(cell.policy) / 100
        is_faulty = cell.delay_s or cell.lost_share
        found[cell] = replace(SOME, ttft_mean_s=mean_s * (1.02 if is_faulty else 1.0))
    return found


@pytest.mark.parametrize("study", [full_study("conversation"), quick_study("conversation")])
def test_answers_have_the_issues_shape(study):
    found = answers(study, made_up(study))
    sizes = ("16",) if len(study.seeds) == 1 else ("16", "64", "256")
    for size in sizes:
        for tiers in ("store", "host"):
            one = found["conversation"][size][tiers]
            assert one["ours_mean_s"] == pytest.approx(1.0)
            assert one["ours_p99_s"] == 9.0
            assert one["best_rival"] == "llm_d"
            assert one["best_rival_mean_s"] == pytest.approx(1.05)
    assert len(found["conversation"]["16"]["store"]["seeds"]) == len(study.seeds)
    assert found["late_5s_ratio"] == pytest.approx(1.02)
    assert found["lost_1pct_ratio"] == pytest.approx(1.02)


def test_without_a_trace_nothing_is_called_a_conversation():
    study = full_study(None)
    assert "conversation" not in answers(study, made_up(study))
    assert all(cell.workload != "conversation" for cell in study.cells)


def test_the_page_and_the_pictures_have_what_was_run(tmp_path):
    study = full_study("conversation")
    figures = made_up(study)
    text = page(answers(study, figures), figures, ["routing-load.png"])
    assert "| 16 | store | **1.000 s** | 9.0 s | llm_d | 1.050 s | -4.8% |" in text
    assert "cache events 5 s late: store +2.0%, host +2.0%" in text
    assert "16 routers" in text
    draw_load_curve(study.curve, figures, tmp_path / "load.png")
    draw_hit_rates(study.main[:5], figures, tmp_path / "hits.png")
    assert min((tmp_path / name).stat().st_size for name in ("load.png", "hits.png")) > 10_000


def test_a_journal_takes_the_place_of_runs(tmp_path):
    traffic = GeneratedTraffic(seed=5, num_sessions=40, hours=0.05)
    workloads = {"small": Workload("small", traffic.requests())}
    journal = tmp_path / "runs.jsonl"
    cells = [
        Cell(policy, workload="small", num_replicas=2, rate=2.0, duration_s=40.0)
        for policy in (OURS, "random")
    ]
    done: list[Cell] = []
    first = run_cells(cells[:1], workloads, 1, lambda cell, _: done.append(cell), journal)
    both = run_cells(cells, workloads, 1, lambda cell, _: done.append(cell), journal)
    assert done == cells
    assert both[cells[0]] == first[cells[0]]
    assert run_cells(cells, {}, 1, lambda *_: pytest.fail("ran again"), journal) == both
