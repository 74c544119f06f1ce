"""Engines over the double, closed whatever a test does."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.config import EngineConfig, KvCacheConfig, ModelSource, ReplicaConfig
from actors.engine import GenerationRequest, SamplingParams, TokenChunk
from actors.engines.trtllm import build
from actors.engines.trtllm.engine import TrtllmEngine
from tests.tiny_model import make_tokenizer, tiny_config
from tests.trtllm_engine import modules
from tests.trtllm_engine.llm import FakeLLM

BLOCK = 8

MakeEngine = Callable[..., TrtllmEngine]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without weights: the double needs none."""
    path = tmp_path_factory.mktemp("model")
    tiny_config().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def trtllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """TensorRT-LLM, as far as anybody here can tell. What a test sets on the class goes with it."""
    modules.install(monkeypatch)
    monkeypatch.setattr(build, "visible_gpus", lambda: ())
    monkeypatch.setattr(build, "await_memory", lambda *_: ())
    for name in (
        "last",
        "refuse_with",
        "says_end_token",
        "empty_with",
        "tokens_per_turn",
        "turn_s",
    ):
        monkeypatch.setattr(FakeLLM, name, getattr(FakeLLM, name))
    for name in (build.IN_PROCESS, *build.ROOT_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return FakeLLM


def replica_config(folder: Path, cache: Any = None, **settings: Any) -> ReplicaConfig:
    settings.setdefault("kv_cache_config", KvCacheConfig(tokens_per_block=BLOCK, max_tokens=512))
    return ReplicaConfig(
        name="replica",
        model=ModelSource(name="tiny", path=str(folder), revision="r1"),
        engine=EngineConfig(kind="trtllm", **settings),
        cache=cache,
    )


@pytest.fixture
def make_engine(trtllm: type[FakeLLM], folder: Path) -> Iterator[MakeEngine]:
    engines: list[TrtllmEngine] = []

    def make(**settings: Any) -> TrtllmEngine:
        engines.append(build.build_trtllm_engine(replica_config(folder, **settings)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def request(prompt: list[int], num_tokens: int = 8, **settings: Any) -> GenerationRequest:
    return GenerationRequest("r", tuple(prompt), SamplingParams(max_tokens=num_tokens, **settings))


async def chunks(engine: TrtllmEngine, wanted: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(wanted)]


def some_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 31 + i * 7) % 250 for i in range(num_tokens)]


async def until(is_so: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async def wait() -> None:
        while not is_so():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), timeout_s)
