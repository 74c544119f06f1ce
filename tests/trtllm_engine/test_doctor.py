"""The doctor finds what differs, and a trial tells a cache that works from one that does not."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.config import KvCacheConfig
from actors.engine import Receipt
from actors.engines.trtllm import doctor, trial
from actors.engines.trtllm.gpu_memory import GpuMemory
from actors.engines.trtllm.trial import Answer, Trial, common_part, judge, run_trial, trial_prompt
from actors.findings import Finding, run_probes
from cluster.cli import main
from shared_cache.connector import process
from tests.trtllm_engine import modules
from tests.trtllm_engine.conftest import replica_config
from tests.trtllm_engine.connected import ConnectedLLM
from tests.trtllm_engine.llm import FakeLLM
from tests.trtllm_runtime.oracle import LAYOUT
from tests.trtllm_runtime.rules import Rules

SIZE = LAYOUT.tokens_per_block


def states(findings: list[Finding]) -> dict[str, str]:
    return {one.name: one.state for one in findings}


@pytest.fixture
def good_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "visible_gpus", lambda: (GpuMemory(0, "GPU-a", 1, 80 << 30),))
    usage = SimpleNamespace(free=1 << 36, total=1 << 37)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    unlimited = doctor.resource.RLIM_INFINITY
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (unlimited, unlimited))
    for name in [n for n in doctor.os.environ if n.startswith(("SLURM_", "PMI", "OMPI_COMM_"))]:
        monkeypatch.delenv(name)


@dataclasses.dataclass
class RequestData:
    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


@pytest.fixture
def installed(trtllm: type[FakeLLM]) -> None:
    sys.modules[modules.CONNECTOR].RequestData = RequestData  # type: ignore[attr-defined]


def test_a_good_installation(
    installed: None, good_machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--engine", "trtllm"]) == 0
    told = capsys.readouterr().out
    assert "FAIL" not in told
    assert "TensorRT-LLM 1.2.1" in told
    assert "kv_cache_connector, as expected" in told


def test_without_it_the_fix_is_told_once(
    monkeypatch: pytest.MonkeyPatch, good_machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    assert main(["doctor", "--engine", "trtllm", "--json"]) == 1
    assert capsys.readouterr().out.count("is not installed here") == 1


def test_another_version_s_differences_are_named(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[modules.CONNECTOR]

    class Changed(modules.SchedulerBase):
        def get_num_new_matched_tokens(self, request: Any, computed: int, more: int) -> None:
            """One argument more than ours takes, and another name."""

        def request_finished(self, request: Any, cache_block_ids: list[int]) -> None:
            """As ever."""

        def a_new_optional_hook(self) -> None:
            """Nothing of ours overrides it."""

    monkeypatch.setattr(module, "KvCacheConnectorScheduler", Changed)
    monkeypatch.setattr(module, "RequestData", dataclasses.make_dataclass("R", ["request_id"]))
    sys.modules["tensorrt_llm"].__version__ = "9.9"  # type: ignore[attr-defined]
    found = {one.name: one for one in run_probes({"version": doctor.version, **doctor.package()})}
    assert found["version"].state == "warn"
    interface = found["connector interface"]
    assert interface.state == "fail"
    assert "get_num_new_matched_tokens takes request, computed, more" in interface.text
    assert "request_finished" not in interface.text
    assert "no new_tokens, new_block_ids" in found["request reports"].text


def test_a_machine_that_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "visible_gpus", lambda: ())
    small = SimpleNamespace(free=1 << 20, total=64 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: small)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    monkeypatch.setenv("FORCE_DETERMINISTIC", "1")
    found = list(run_probes(doctor.machine()))
    assert states(found) == {
        "GPUs": "fail",
        "shared memory": "fail",
        "locked memory": "warn",
        "environment": "fail",
    }
    assert "--ipc=host" in found[1].text
    monkeypatch.delenv("FORCE_DETERMINISTIC")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert doctor.environment().state == "warn"
    busy = (GpuMemory(0, "GPU-a", 70 << 30, 80 << 30),)
    monkeypatch.setattr(doctor, "visible_gpus", lambda: busy)
    assert doctor.gpus().state == "warn"


def test_a_probe_that_raises_is_a_finding() -> None:
    def fail() -> Finding:
        raise ValueError("no")

    found = list(run_probes({"a": fail, "b": lambda: Finding("b", "ok", "")}))
    assert found == [Finding("a", "fail", "ValueError: no"), Finding("b", "ok", "")]


async def test_a_trial_on_the_double(
    trtllm: type[FakeLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial that a GPU machine runs, on the double's executor with the real connector."""
    import json

    from tests.tiny_model import make_tokenizer
    from tests.trtllm_engine.connected import MODEL

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    make_tokenizer().save_pretrained(folder)
    modules.install(monkeypatch, llm=ConnectedLLM)
    monkeypatch.setenv("TLLM_SHARED_CACHE_CONFIG", "")
    monkeypatch.setattr(trial, "HOST_BYTES", 1 << 20)
    monkeypatch.setattr(trial, "PROMPT_BLOCKS", 10)
    rules = Rules(num_blocks=64, max_num_tokens=64, enable_chunked_prefill=True, overlap=True)
    monkeypatch.setattr(ConnectedLLM, "rules", rules)
    kv = KvCacheConfig(tokens_per_block=SIZE, max_tokens=64 * SIZE)
    config = replica_config(folder, kv_cache_config=kv, max_num_tokens=64)
    found = await run_trial(config, tmp_path / "store")
    told = judge(found, SIZE)
    assert [one for one in told if one.state == "fail"] == []
    assert found.cold is not None
    assert found.loaded is not None
    assert found.cold.tokens == found.loaded.tokens
    assert process.current_cache() is None


def answer(cached: int, tokens: tuple[int, ...] = (1, 2, 3, 4), device: int = 0) -> Answer:
    host = cached - device
    return Answer(Receipt(321, device, host, 0, 321 - cached), tokens, 0.1)


def test_a_trial_that_shows_a_broken_cache() -> None:
    size = 8
    good = Trial(answer(0), answer(320, device=320), answer(0), answer(320), [], True)
    assert {one.state for one in judge(good, size)[:-1]} == {"ok"}
    for change in (
        {"cold": answer(8)},
        {"again": answer(0)},
        {"salted": answer(320)},
        {"loaded": answer(0)},
        {"loaded": answer(320, (1, 9, 9, 9))},
        {"is_alive_after_abort": False},
    ):
        told = judge(dataclasses.replace(good, **change), size)  # type: ignore[arg-type]
        assert [one.state for one in told[:-1]].count("fail") == 1, change


def test_the_trial_s_prompt_has_no_equal_blocks() -> None:
    tokens = trial_prompt(40 * 64 + 1)
    blocks = [tokens[start : start + 32] for start in range(0, len(tokens) - 32, 32)]
    assert len(set(blocks)) == len(blocks)
    assert all(1000 <= token < 25_000 for token in tokens)


def test_common_part() -> None:
    assert common_part([1, 2, 3, 4], [1, 2, 3, 9]) == 0.75
    assert common_part([1, 2], [1, 2, 3]) == 1.0
    assert common_part([], [1]) == 1.0
