"""The GPU benchmarks run without a GPU too, on a tiny shape; no figure is looked at."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import cluster_load, decode, fetch, itl, ngram, summary, ttft, turns, two_gpus
from benchmarks.gpu.pictures import table
from tests.engine.conftest import ModelPath

TTFT_KINDS = {"cold", "device", "host", "shared_page_cache", "shared_cold_disk"}


def run(module: Any, monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(path), *arguments])
    module.main()
    return json.loads(path.read_text())


def test_decode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode, "BATCHES", (1, 3))
    found = run(decode, monkeypatch, tmp_path / "d.json", "--context", "40", "--steps", "12")
    assert set(found["decode"]) == {"1", "3"}
    assert found["device"] == "cpu (dry run)"


def test_inter_token_latency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = ("--running", "2", "--context", "40", "--prompt", "128", "--steps", "24")
    found = run(itl, monkeypatch, tmp_path / "i.json", *small, "--rounds", "1")
    assert found["itl"]["loads"]["loaded_tokens"] > 0
    assert found["itl"]["alone"]["intruders"] == 0
    assert found["itl_p99_ratio"] > 0


def test_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "THREADS", (1, 3))
    monkeypatch.setattr(fetch, "PROCESSES", ((2, 2),))
    monkeypatch.setattr(fetch, "IO_THREADS", (2, 4))
    found = run(fetch, monkeypatch, tmp_path / "f.json", "--blocks", "6", "--rounds", "1")
    ways = {name.partition(" ")[0].rstrip(",") for name in found["fetch"]}
    assert ways == {"read", "read+hash", "stage", "stage+load", "load"}
    assert any("processes" in name for name in found["fetch"])
    assert all(one["wall_ms"] > 0 for one in found["fetch"].values())
    # Every block is read and hashed once, and every piece of eight is claimed and committed.
    phases = found["phases"]["4"]["phases"]
    assert phases["hash"]["calls"] == 6
    assert phases["claim"]["calls"] >= 1
    assert phases["commit"]["calls"] >= 1
    assert phases["lock of the fetches"]["calls"] > 0


class FakeEvent:
    """Stands in for a CUDA event: what it measures is one."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1.0


def test_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(turns, "device", lambda: "cuda")  # events are recorded, and these are ours
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    small = ("--running", "2", "--context", "40", "--prompt", "128", "--steps", "24")
    found = run(turns, monkeypatch, tmp_path / "t.json", *small, "--rounds", "1")
    assert found["not_there"] == []
    assert set(found["turns"]) == {"batch 1", "alone", "device", "loads"}
    assert found["turns"]["loads"]["between_tokens"]["loaded_tokens"] > 0
    for kind, batch in (("batch 1", 1), ("alone", 2)):
        one = found["turns"][kind]
        assert one["phases"]["deciding"]["calls"] == 1
        assert one["phases"]["recording"]["calls"] == batch
        # All phases together are the turns.
        walls_ms = sum(phase["wall_ms"] for phase in one["phases"].values())
        assert walls_ms == pytest.approx(one["turn_ms"]["mean"], rel=0.01)
        assert one["device_ms"]["output layer"]["per_turn"] == pytest.approx(1.0, rel=0.2)


@pytest.mark.slow
def test_time_to_first_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(ttft, monkeypatch, tmp_path / "t.json", "--rounds", "1", "--lengths", "128")
    assert set(found["ttft_ms"]["128"]) == TTFT_KINDS
    assert found["common_prefix_min"] == 1.0
    assert found["dropped_saves"] == 0


@pytest.mark.slow
def test_the_demonstration_in_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = ("--document", "128", "--clients", "1", "--conversations", "1", "--answer", "3")
    found = run(cluster_load, monkeypatch, tmp_path / "c.json", *small, "--rules", "round_robin")
    assert found["offload"]["enabled"]["reused_blocks"] > 0
    one, two = (found["load"][name] for name in ("one replica", "2 replicas, round_robin"))
    assert (one["num_requests"], two["num_requests"]) == (2, 4)
    assert sum(two["tokens_from"].values()) > sum(one["tokens_from"].values())
    assert found["requests_ratio"] > 0


@pytest.mark.slow
def test_two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = ("--document", "96", "--clients", "2", "--requests", "4", "--answer", "4")
    found = run(
        two_gpus, monkeypatch, tmp_path / "g.json", *small, "--rounds", "1", "--lengths", "128"
    )
    assert set(found["ttft_ms"]["128"]) >= {"cold", "same_gpu", "other_gpu"}
    assert found["requests_ratio"] > 0
    assert found["host_bytes_per_cached_token"] == 2 * 2 * 2 * 16 * 4, "one copy of all layers"


def test_ngram(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_path: ModelPath) -> None:
    model = str(model_path("llama", max_position_embeddings=8192))
    arguments = ("--model", model, "--new-tokens", "12", "--rounds", "1")
    found = run(ngram, monkeypatch, tmp_path / "n.json", *arguments)
    assert found["ngram_speedup"] > 0
    assert found["common_prefix_tokens"] == 12


def test_the_committed_figures_are_those_of_their_parts() -> None:
    parts = summary.read_parts(summary.RESULTS, "h200")
    committed = json.loads((summary.RESULTS / "h200.json").read_text())
    assert summary.summary(parts) == committed
    assert (summary.RESULTS / "h200.md").read_text() == table(committed)


def test_the_summary_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    png, text = tmp_path / "gpu.png", tmp_path / "gpu.md"
    found = run(summary, monkeypatch, tmp_path / "s.json", f"--picture={png}", f"--table={text}")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert text.read_text() == table(found)
    assert "not measured" in table({**found, "ngram_speedup": None})
