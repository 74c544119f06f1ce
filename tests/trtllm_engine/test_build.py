"""From settings to an engine: what TensorRT-LLM is told, and what is refused with its fix."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from actors.config import EngineConfig, KvCacheConfig, NGramConfig
from actors.engines import build_engine
from actors.engines.trtllm import api as api_module
from actors.engines.trtllm import build, gpu_memory, sharing
from actors.engines.trtllm.api import load_api
from actors.engines.trtllm.arguments import llm_arguments
from actors.engines.trtllm.gpu_memory import GpuMemory, await_memory, still_used
from shared_cache.config import CacheConfig
from shared_cache.connector.trtllm_config import CONFIG_VARIABLE, ConnectorConfig
from shared_cache.errors import ConfigError, KvcommonsError, ModelError
from tests.trtllm_engine import modules
from tests.trtllm_engine.conftest import BLOCK, replica_config
from tests.trtllm_engine.llm import FakeLLM

KV = KvCacheConfig(tokens_per_block=BLOCK, max_tokens=512)
HOST = {"host": {"scope": "process", "bytes": 1 << 20}}


def arguments(folder: Path, cache: Any = None, **settings: Any) -> dict[str, Any]:
    return llm_arguments(replica_config(folder, cache, **settings), load_api())


def test_plain_settings(trtllm: type[FakeLLM], folder: Path) -> None:
    got = arguments(folder, max_seq_len=300, dtype="bfloat16", max_batch_size=4)
    kv = got.pop("kv_cache_config")
    assert got == {
        "model": str(folder),
        "tensor_parallel_size": 1,
        "dtype": "bfloat16",
        "max_batch_size": 4,
        "max_num_tokens": 512,
        "max_seq_len": 300,
        "enable_chunked_prefill": True,
        "enable_iter_perf_stats": True,
        "max_stats_len": 10_000,
    }
    assert (kv.tokens_per_block, kv.max_tokens, kv.enable_block_reuse) == (BLOCK, 512, True)
    assert kv.enable_partial_reuse is False
    assert kv.event_buffer_max_size > 0
    assert kv.host_cache_size is None


@pytest.mark.parametrize("kv_class", [modules.KvCacheConfig, modules.LaterKvCacheConfig])
def test_shared(
    trtllm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch, kv_class: Any
) -> None:
    modules.install(monkeypatch, kv_class)
    got = arguments(folder, CacheConfig(), kv_cache_config=KV)
    connector, kv = got["kv_connector_config"], got["kv_cache_config"]
    assert connector.connector_module == "shared_cache.connector.tensorrt_llm"
    assert connector.connector_scheduler_class == "SharedCacheScheduler"
    assert connector.connector_worker_class == "SharedCacheWorker"
    assert kv.host_cache_size == 0
    assert getattr(kv, "use_kv_cache_manager_v2", False) is False
    assert "speculative_config" not in got


def test_offload(trtllm: type[FakeLLM], folder: Path) -> None:
    kv = KV.model_copy(update={"host_cache_size": 1 << 30})
    got = arguments(folder, kv_cache_config=kv)
    assert got["kv_cache_config"].host_cache_size == 1 << 30
    assert "kv_connector_config" not in got


def test_ngram(trtllm: type[FakeLLM], folder: Path) -> None:
    got = arguments(folder, speculative_config=NGramConfig(max_draft_len=5))
    assert got["speculative_config"].max_draft_len == 5
    assert got["speculative_config"].max_matching_ngram_size == 3
    assert got["disable_overlap_scheduler"] is True


def test_further_arguments_are_passed_on_as_they_are(trtllm: type[FakeLLM], folder: Path) -> None:
    further = {
        "cuda_graph_config": None,
        "attn_backend": "TRTLLM",
        "enable_chunked_prefill": False,
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        "kv_cache_config": {"dtype": "fp8", "event_buffer_max_size": 3},
    }
    got = arguments(folder, llm_args=further)
    kv = got.pop("kv_cache_config")
    assert (kv.dtype, kv.event_buffer_max_size) == ("fp8", 3)
    assert {name: got[name] for name in further if name in got} == {
        name: value for name, value in further.items() if name != "kv_cache_config"
    }


NO_REUSE = KV.model_copy(update={"enable_block_reuse": False})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"llm_args": {"model": "x"}}, "engine.llm_args.model is decided by model"),
        ({"llm_args": {"tensor_parallel_size": 2}}, "decided by engine.tensor_parallel_size"),
        ({"llm_args": {"kv_connector_config": {}}}, "decided by cache"),
        ({"llm_args": {"kv_cache_config": {"max_tokens": 3}}}, "kv_cache_config.max_tokens is dec"),
        ({"llm_args": {"kv_cache_config": 3}}, "must hold settings"),
        (
            {"llm_args": {"kv_cache_config": {"nonsense": 3}}},
            "(?s)refuses its KvCacheConfig.*nonsense",
        ),
        ({"llm_args": {"orchestrator_type": "ray"}}, "wait for GPUs"),
        ({"cache": CacheConfig(), "kv_cache_config": NO_REUSE}, "never ask the cache"),
        (
            {
                "cache": CacheConfig(),
                "llm_args": {"kv_cache_config": {"enable_partial_reuse": True}},
            },
            "end inside blocks",
        ),
        (
            {"cache": CacheConfig(), "llm_args": {"load_format": "VISION_ONLY"}},
            "engine.llm_args.load_format is VISION_ONLY.*remove it, or remove cache",
        ),
    ],
)
def test_what_would_go_wrong_later_is_refused(
    trtllm: type[FakeLLM], folder: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        arguments(folder, **settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "torch", "tensor_parallel_size": 2}, "no tensor_parallel_size"),
        ({"kind": "torch", "llm_args": {"a": 1}}, "no llm_args"),
        (
            {"kind": "torch", "kv_cache_config": {"free_gpu_memory_fraction": 0.5}},
            "free_gpu_memory_fraction",
        ),
        ({"kind": "trtllm", "device": "cuda"}, "remove it and set tensor_parallel_size"),
        ({"kind": "trtllm", "torch_threads": 2}, "torch_threads"),
        (
            {
                "kind": "trtllm",
                "speculative_config": {},
                "kv_cache_config": {"host_cache_size": "1GiB"},
            },
            "one of two",
        ),
    ],
)
def test_settings_of_the_other_engine(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    "engine", [{"speculative_config": NGramConfig()}, {"llm_args": {"speculative_config": {}}}]
)
def test_drafts_beside_a_connector(folder: Path, engine: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"1\.2 refuses drafts"):
        replica_config(folder, CacheConfig(), **engine)


def test_the_modes(folder: Path) -> None:
    host = KV.model_copy(update={"host_cache_size": 1 << 30})
    assert replica_config(folder, CacheConfig()).trtllm_mode == "shared"
    assert replica_config(folder, kv_cache_config=host).trtllm_mode == "offload"
    assert replica_config(folder, speculative_config=NGramConfig()).trtllm_mode == "ngram"
    assert replica_config(folder).trtllm_mode == "plain"


def test_an_engine_is_built_and_closed(trtllm: type[FakeLLM], folder: Path) -> None:
    engine = build_engine(replica_config(folder))
    assert os.environ[build.IN_PROCESS] == "1"
    assert engine.is_alive()
    assert engine.cache is None
    assert engine.namespace.layout.tokens_per_block == BLOCK
    assert engine.max_total_tokens == 512
    engine.close()
    assert trtllm.last.shutdown_calls == 1
    assert not engine.is_alive()


def test_several_ranks_are_left_to_mpi(
    trtllm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.IN_PROCESS, "1")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    build_engine(replica_config(folder, tensor_parallel_size=2)).close()
    assert build.IN_PROCESS not in os.environ
    assert [os.environ[name] for name in build.ROOT_VARIABLES] == ["1", "1"]


@pytest.mark.parametrize(
    ("error", "expected", "named"),
    [
        (NotImplementedError("no PP"), ConfigError, "1.2.1 refuses these settings: no PP"),
        (ValueError("bad"), ConfigError, "correct engine.llm_args"),
        (RuntimeError("out of memory"), ModelError, "does not start: out of memory"),
    ],
)
def test_an_llm_that_does_not_start(
    trtllm: type[FakeLLM],
    folder: Path,
    error: Exception,
    expected: type[KvcommonsError],
    named: str,
) -> None:
    trtllm.refuse_with = error
    with pytest.raises(expected, match=named):
        build_engine(replica_config(folder))


def test_an_engine_that_gives_no_token_does_not_start(
    trtllm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FakeLLM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fails_with = RuntimeError("illegal memory access")

    monkeypatch.setattr(sys.modules["tensorrt_llm"], "LLM", Broken)
    with pytest.raises(ModelError, match=r"does not run.*illegal memory access"):
        build_engine(replica_config(folder))
    assert trtllm.last.shutdown_calls == 1


def test_without_tensorrt_llm(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ConfigError, match=r"container .docs/tensorrt-llm.md., or set kind: torch"):
        build_engine(replica_config(folder))


def test_a_broken_installation_is_told_from_a_missing_one(
    trtllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.delattr(sys.modules["tensorrt_llm"], "LLM")
    with pytest.raises(ConfigError, match="installed but cannot be used"):
        build_engine(replica_config(folder))


def test_a_salt_s_number_by_upstream_s_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    class Digest:
        def digest(self, length: int) -> bytes:
            return bytes(range(1, length + 1))

    number = api_module._salt_id_by_rule(lambda data: Digest())
    assert number("salt") == 0x0807060504030201


def test_the_connector_finds_its_settings(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    cache = CacheConfig(store=f"file://{tmp_path}/store", staging_deadline_s=1.5, **HOST)
    sharing.write_connector_config(replica_config(folder, cache), tmp_path / "connector.yaml")
    assert os.environ[CONFIG_VARIABLE] == str(tmp_path / "connector.yaml")
    written = ConnectorConfig.model_validate(
        yaml.safe_load((tmp_path / "connector.yaml").read_text())
    )
    assert {name: getattr(written, name) for name in CacheConfig.model_fields} == {
        name: getattr(cache, name) for name in CacheConfig.model_fields
    }
    assert (written.model, written.revision) == ("tiny", "r1")
    assert (written.match_wait_s, written.staged_ahead) == (0.0, True)
    two = replica_config(folder, CacheConfig(), tensor_parallel_size=2)
    sharing.write_connector_config(two, tmp_path / "two.yaml")
    assert yaml.safe_load((tmp_path / "two.yaml").read_text())["staged_ahead"] is False
    alone = replica_config(folder, cache, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="write scope: node"):
        sharing.write_connector_config(alone, tmp_path / "x.yaml")


SMI = "0, GPU-aaaa, 1000, 80000\n1, GPU-bbbb, 70000, 80000\n"
APPS = "GPU-bbbb, 4711, 69000\nGPU-cccc, 1, 2\n"


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Any, **_: Any) -> Any:
        text = APPS if any("compute-apps" in part for part in command) else SMI
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(gpu_memory.subprocess, "run", run)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1]), ("1", [1]), ("GPU-bb", [1]), ("0,1", [0, 1]), ("", []), ("7", [])],
)
def test_visible_gpus(
    smi: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in gpu_memory.visible_gpus()] == expected


def test_a_machine_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert gpu_memory.visible_gpus() == ()


def test_memory_that_gets_free_is_waited_for() -> None:
    left = [30, 20, 5]
    gpus = lambda: [GpuMemory(0, "GPU-a", left.pop(0), 100)]  # noqa: E731
    assert await_memory(lambda gpu: 10, 30.0, gpus) == ()
    assert left == []


def test_memory_that_does_not_get_free_names_who_has_it(smi: None) -> None:
    busy = GpuMemory(1, "GPU-bbbb", 70 << 30, 80 << 30)
    full = await_memory(lambda gpu: 10, 0.0, lambda: [busy])
    assert full == (busy,)
    message = str(still_used(full, 60.0))
    assert "GPU 1: 70.0 GiB" in message
    assert "process 4711 (69000 MiB)" in message
    assert f"End this process ({os.getpid()})" in message


def test_closing_waits_for_memory_and_says_when_it_stays_full(
    trtllm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (GpuMemory(0, "GPU-a", 1 << 30, 80 << 30),)
    after = (GpuMemory(0, "GPU-a", 40 << 30, 80 << 30),)
    asked = []

    def await_it(most_used: Any, timeout_s: float) -> tuple[GpuMemory, ...]:
        asked.append(most_used(before[0]))
        return after if len(asked) > 1 else ()

    monkeypatch.setattr(build, "visible_gpus", lambda: before)
    monkeypatch.setattr(build, "await_memory", await_it)
    engine = build_engine(replica_config(folder))
    with pytest.raises(KvcommonsError, match=r"still in use.*GPU 0: 40.0 GiB"):
        engine.close()
    assert asked == [8 << 30, 3 << 30]
    engine.close()
