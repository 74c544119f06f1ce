"""A replica's whole path on TensorRT-LLM's two doubles: staged, matched, loaded, and told truly.

The pool under it checks every byte that a forward pass reads, so nothing wrong is loaded unseen.
"""

import importlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.config import KvCacheConfig
from actors.engine import GenerationRequest, Receipt, SamplingParams
from actors.engines.trtllm import build
from actors.replica import EngineReplica
from shared_cache.config import CacheConfig
from shared_cache.connector import process
from shared_cache.connector.identity import reuse_scope
from shared_cache.hashing import ReuseScope
from tests.tiny_model import make_tokenizer
from tests.trtllm_engine import modules
from tests.trtllm_engine.conftest import replica_config
from tests.trtllm_engine.connected import MODEL, ConnectedLLM
from tests.trtllm_engine.llm import FakeLLM
from tests.trtllm_runtime.oracle import LAYOUT
from tests.trtllm_runtime.requests import LaterLlmRequestBase, LlmRequestBase, Request

SIZE = LAYOUT.tokens_per_block
WAIT_S = 20.0
PROMPT = tuple(range(100, 100 + 10 * SIZE + 1))
OTHER = tuple(range(900, 900 + 10 * SIZE + 1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def connected(trtllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    modules.install(monkeypatch, llm=ConnectedLLM)
    monkeypatch.setenv("TLLM_SHARED_CACHE_CONFIG", "")
    yield
    while process.current_cache() is not None:
        process.leave_current(0.0)


@pytest.fixture(autouse=True)
def freed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the connector had let go of the pool when GPU memory was looked at, per engine."""
    found: list[bool] = []

    def look() -> None:
        llm = FakeLLM.last
        assert isinstance(llm, ConnectedLLM)
        found.append(llm.worker._copier is None)

    monkeypatch.setattr(build, "_ending", lambda before: look)
    return found


@asynccontextmanager
async def replica(model: Path, store: Path) -> AsyncIterator[EngineReplica]:
    """A replica of its own: nothing but the store is left of the one before."""
    cache = CacheConfig.model_validate(
        {
            "store": f"file://{store}",
            "host": {"scope": "process", "bytes": "1MiB"},
            "cost": {"gate": False},
            "staging_deadline_s": WAIT_S,
        }
    )
    kv = KvCacheConfig(tokens_per_block=SIZE, max_tokens=64 * SIZE)
    settings: dict[str, Any] = {"kv_cache_config": kv, "max_num_tokens": 64, "max_batch_size": 8}
    one = EngineReplica(replica_config(model, cache, **settings))
    await one.ready()
    try:
        yield one
        assert await one.drain(WAIT_S)
    finally:
        await one.close()
    llm = FakeLLM.last
    assert isinstance(llm, ConnectedLLM)
    assert llm.error is None
    assert llm.scheduler.connector_faults == llm.worker.connector_faults == 0


def request(prompt: tuple[int, ...], salt: str | None = None) -> GenerationRequest:
    return GenerationRequest("r", prompt, SamplingParams(5, ignore_eos=True), ReuseScope(salt))


async def ask(one: EngineReplica, wanted: GenerationRequest) -> tuple[Receipt, list[int]]:
    got = [chunk async for chunk in one.generate(wanted)]
    assert got[0].receipt is not None
    return got[0].receipt, [token for chunk in got for token in chunk.token_ids]


@pytest.mark.parametrize("salt", [None, "tenant"])
async def test_what_one_replica_computed_another_one_loads(
    model: Path, tmp_path: Path, salt: str | None
) -> None:
    wanted = request(PROMPT, salt)
    async with replica(model, tmp_path / "store") as first:
        receipt, tokens = await ask(first, wanted)
        assert receipt == Receipt(len(PROMPT), 0, 0, 0, len(PROMPT))
        again, same = await ask(first, wanted)
        assert again == Receipt(len(PROMPT), 40, 0, 0, 1)
        assert same == tokens
    async with replica(model, tmp_path / "store") as second:
        receipt, loaded = await ask(second, wanted)
        assert receipt == Receipt(len(PROMPT), 0, 0, 40, 1)
        assert loaded == tokens
        stats = (await second.stats()).engine
        assert stats is not None
        assert stats.prefill_tokens == 1


async def test_the_pool_is_let_go_before_gpu_memory_is_looked_at(
    model: Path, tmp_path: Path, freed: list[bool]
) -> None:
    """TensorRT-LLM closes no worker, and GPU memory is waited for in vain while one has a view."""
    async with replica(model, tmp_path / "store"):
        llm = FakeLLM.last
        assert isinstance(llm, ConnectedLLM)
        assert llm.worker._copier is not None
    assert freed == [True]


async def test_another_tenant_finds_nothing(model: Path, tmp_path: Path) -> None:
    async with replica(model, tmp_path / "store") as first:
        await ask(first, request(PROMPT, "tenant"))
    async with replica(model, tmp_path / "store") as second:
        for salt in (None, "another"):
            receipt, _ = await ask(second, request(PROMPT, salt))
            assert receipt.computed == len(PROMPT)
        receipt, _ = await ask(second, request(PROMPT, "tenant"))
        assert receipt.shared == 40


async def test_host_memory_serves_what_the_pool_has_lost(model: Path, tmp_path: Path) -> None:
    async with replica(model, tmp_path / "store") as one:
        _, tokens = await ask(one, request(PROMPT))
        for start in range(0, 16_000, 2000):  # push it out of the pool
            await ask(one, request(tuple(range(start + 200, start + 200 + 12 * SIZE))))
        receipt, same = await ask(one, request(PROMPT))
        assert receipt == Receipt(len(PROMPT), 0, 40, 0, 1)
        assert same == tokens


async def test_a_stream_goes_on_in_another_replica(model: Path, tmp_path: Path) -> None:
    wanted = replace(request(PROMPT), sampling=SamplingParams(20, ignore_eos=True))
    async with replica(model, tmp_path / "store") as first:
        _, whole = await ask(first, wanted)
    async with replica(model, tmp_path / "store") as second:
        receipt, rest = await ask(second, wanted.continued(tuple(whole[:9])))
        assert whole[:9] + rest == whole
        assert receipt.shared == (len(PROMPT) + 8) // SIZE * SIZE


async def test_a_replica_that_fails_to_join_leaves_nothing_open(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(build, "join_cache", fail)
    cache = CacheConfig.model_validate({"host": {"scope": "process", "bytes": "1MiB"}})
    kv = KvCacheConfig(tokens_per_block=SIZE, max_tokens=64 * SIZE)
    with pytest.raises(RuntimeError, match="no"):
        build.build_trtllm_engine(replica_config(model, cache, kv_cache_config=kv))
    assert process.current_cache() is None


def test_what_is_staged_is_named_as_the_connector_names_it(model: Path) -> None:
    """The engine translates a salt as TensorRT-LLM does before its connector sees it."""
    from actors.engines.trtllm.api import load_api
    from actors.engines.trtllm.engine import TrtllmEngine
    from actors.engines.trtllm.service import ServedModel, SharedPart
    from shared_cache.namespace import Namespace

    kv = modules.KvCacheConfig(max_tokens=512)
    llm = FakeLLM("m", kv_cache_config=kv, enable_chunked_prefill=True, max_num_tokens=64)
    part = SharedPart(Namespace("m", "r", "t", LAYOUT), None, lambda: None)
    served = ServedModel(make_tokenizer(), frozenset({2}), 259, 512)
    engine = TrtllmEngine(llm, load_api(), served, part, "plain")
    try:
        for salt in (None, "tenant", "\u00fcml\u00e4ut"):
            for kind in (LlmRequestBase, LaterLlmRequestBase):
                seen = kind(Request(1, (1,), cache_salt=salt))
                assert engine.storage_scope(ReuseScope(salt)) == reuse_scope(seen)
    finally:
        engine.close()


async def test_the_recorder_of_the_gpu_tests_writes_what_happens(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/gpu_trtllm` has never run; its diary shall not be what fails there first."""
    name = "tests.gpu_trtllm.recorder"
    monkeypatch.delitem(sys.modules, name, raising=False)
    settings = tmp_path / "cache.yaml"
    settings.write_text(f"store: file://{tmp_path}/s\nhost: {{scope: process, bytes: 1MiB}}\n")
    settings.write_text(settings.read_text() + "revision: r\nstats_period_s: 0\n")
    monkeypatch.setenv("TLLM_SHARED_CACHE_CONFIG", str(settings))
    connector = modules.KvCacheConnectorConfig(
        connector_module=name,
        connector_scheduler_class="RecordingScheduler",
        connector_worker_class="RecordingWorker",
    )
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    kv = modules.KvCacheConfig(tokens_per_block=SIZE, enable_partial_reuse=False)
    llm = ConnectedLLM(
        str(model),
        kv_cache_config=kv,
        kv_connector_config=connector,
        max_num_tokens=64,
        enable_chunked_prefill=True,
    )
    recorder = importlib.import_module(name)
    params = modules.SamplingParams(max_tokens=2, end_id=-1)
    async for _ in llm.generate_async({"prompt_token_ids": list(PROMPT)}, params, streaming=True):
        pass
    llm.shutdown()
    assert llm.error is None
    calls = recorder.methods()
    assert sorted(calls[:2]) == ["scheduler", "worker"]
    assert calls[2] == "register"
    inner = [one for one in calls[3:] if one != "poll" and "layer" not in one]
    assert inner[:5] == ["match", "alloc", "build", "load", "save"]
    assert "before layer" in calls
    assert inner[-1] in ("finished", "save")
