"""The whole demo as a person starts it, on a tiny model: output, figures, exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.demo.__main__ import main, read_config
from cluster.demo.load import percentile
from shared_cache.errors import ConfigError

TIERS = {"device", "host", "shared", "computed"}


def write_config(folder: Path, model: Path | str, **engine: Any) -> Path:
    file = folder / "tiny.yaml"
    settings = {
        "model": str(model),
        "replicas": 2,
        "num_cpus_per_replica": 0.5,
        "engine": {
            "torch_threads": 1,
            "kv_cache_config": {"tokens_per_block": 16, "max_tokens": 2048},
            **engine,
        },
    }
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], Path]:
    """One quick run of everything, with a replica killed under load."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "cluster.demo", "--quick", "--chaos"]
    command += ["--config", str(write_config(folder, tiny_model))]
    command += ["--json", str(folder / "out.json"), "--report-dir", str(folder / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=360)
    assert (folder / "out.json").exists(), done.stdout + done.stderr
    return done, json.loads((folder / "out.json").read_text()), folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # for the run that they share
def test_every_expectation_is_met(run) -> None:
    done, report, _ = run
    assert report["failures"] == {}
    assert done.returncode == 0
    assert report["ok"] is True
    assert list(report["scenario"]) == ["share", "offload", "ngram", "load"]
    assert "Every expectation was met" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # for the run that they share
def test_share_matches_what_another_process_computed(run) -> None:
    done, report, _ = run
    share = report["scenario"]["share"]
    assert share["matched_blocks_first"] == 0
    assert share["matched_blocks_second"] == (share["prompt_tokens"] - 1) // 16
    assert share["identical_output"] is True
    assert share["ttft_first_s"] > 0
    assert share["ttft_second_s"] > 0
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    steps = [
        "[1] Creating first LLM instance...",
        "[2] Generating with first instance (computing KV cache)...",
        "    KV CONNECTOR: Matched 0 blocks for request 0",
        "[3] Destroying first LLM instance...",
        "[4] Creating second LLM instance (new instance, same connector)...",
        "[5] Generating with second instance (should load cached blocks)...",
        f"    KV CONNECTOR: Matched {share['matched_blocks_second']} blocks for request 0"
        "   ← Cache hit!",
        "✓ SUCCESS: Both outputs are identical!",
    ]
    places = [lines.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # for the run that they share
def test_offload_reuses_only_with_host_memory(run) -> None:
    _, report, _ = run
    offload = report["scenario"]["offload"]
    assert offload["disabled"]["reused_blocks"] == 0
    assert offload["disabled"]["cache_hit_rate"] == 0
    enabled, disabled = offload["enabled"], offload["disabled"]
    assert enabled["reused_blocks"] == enabled["missed_blocks"]  # the second A and B, whole
    assert enabled["reused_blocks"] + enabled["missed_blocks"] == disabled["missed_blocks"]
    assert enabled["cache_hit_rate"] == 0.5
    assert len(enabled["ttft_s"]) == 4


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # for the run that they share
def test_ngram_changes_nothing_but_the_speed(run) -> None:
    done, report, _ = run
    ngram = report["scenario"]["ngram"]
    assert set(ngram["prompts"]) == {"edit", "summary"}
    assert all(one["identical_output"] for one in ngram["prompts"].values())
    assert 0 < ngram["accepted_drafts"] < ngram["generated_tokens"]
    assert ngram["plain_tokens_per_s"] > 0
    assert ngram["ngram_tokens_per_s"] > 0
    assert done.stdout.count("Performance Statistics:") == 4
    assert f"Total tokens generated: {ngram['generated_tokens']}" in done.stdout
    assert "tokens/sec" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # for the run that they share
def test_load_computes_less_when_shared_and_survives_a_kill(run) -> None:
    _, report, folder = run
    load = report["scenario"]["load"]
    modes = {name: load[name] for name in ("none", "local", "shared")}
    prompt_tokens = {sum(mode["tokens_from"].values()) for mode in modes.values()}
    assert len(prompt_tokens) == 1
    for mode in modes.values():
        assert set(mode["tokens_from"]) == TIERS
        assert mode["prefill_tokens_computed"] == mode["tokens_from"]["computed"]
        assert mode["num_requests"] == 18
        assert 0 < mode["ttft_p50_s"] <= mode["ttft_p99_s"]
        assert mode["tokens_per_s"] > 0
    computed = {name: mode["prefill_tokens_computed"] for name, mode in modes.items()}
    assert computed["none"] == prompt_tokens.pop()
    assert computed["shared"] < computed["local"] < computed["none"]
    assert load["killed"].startswith("demo-shared-")
    assert load["num_lost"] == 0
    assert load["identical_output"] is True
    assert (folder / "report" / "load.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_settings_end_with_their_explanation(tmp_path: Path, capsys) -> None:
    config = write_config(tmp_path, "smollm2-135m", max_batchsize=4)
    assert main(["--config", str(config)]) == 2
    said = capsys.readouterr().out
    assert "max_batchsize" in said
    assert "max_batch_size" in said


def test_a_missing_model_ends_with_its_explanation(tmp_path: Path, capsys) -> None:
    assert main(["--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().out


def test_a_model_that_is_too_short_is_refused(tiny_model: Path, tmp_path: Path, capsys) -> None:
    config = write_config(tmp_path, tiny_model, max_seq_len=64)
    assert main(["--config", str(config)]) == 2
    assert "max_seq_len" in capsys.readouterr().out


def test_configuration_comes_from_the_file_and_the_command_line(tmp_path: Path) -> None:
    file = write_config(tmp_path, "some/model")
    assert read_config(file, None).model == "some/model"
    assert read_config(file, "other").model == "other"
    assert read_config(None, None).model == "smollm2-135m"
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_config(tmp_path / "nowhere.yaml", None)


@pytest.mark.parametrize("wrong", [["--ngram-window", "0"], ["--scenario", "nosuch"]])
def test_wrong_options_are_refused(wrong: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_percentiles_are_values_that_occurred() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.99) == 5.0
    assert percentile([7.0], 0.5) == 7.0
