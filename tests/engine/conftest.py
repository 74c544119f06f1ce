"""Tiny models written once, and engines that are closed whatever a test does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import EngineConfig, KvCacheConfig, ReplicaConfig
from actors.engine import GenerationRequest, SamplingParams, TokenChunk
from actors.engines.torch.build import build_torch_engine
from actors.engines.torch.compute import ComputeThread
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.engine import TorchEngine
from actors.engines.torch.forward import PlainForward
from actors.engines.torch.model import block_layout, load_model
from actors.engines.torch.pool import PagedPool, allocate_pool
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.namespace import Namespace
from tests.tiny_model import make_tiny_model, tiny_source

BLOCK = 8
HOST = HostConfig(scope="process", bytes=1 << 20)

ModelPath = Callable[..., Path]
MakeEngine = Callable[..., TorchEngine]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> ModelPath:
    """The folder of a tiny model of one family; `changes` go to its config."""
    made: dict[str, Path] = {}

    def path(family: str = "llama", **changes: Any) -> Path:
        key = f"{family}-{sorted(changes.items())}"
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return path


def engine_config(
    pool_tokens: int = 512, reuse: bool = True, host_bytes: int | None = None, **settings: Any
) -> EngineConfig:
    kv = KvCacheConfig(
        tokens_per_block=BLOCK,
        max_tokens=pool_tokens,
        enable_block_reuse=reuse,
        host_cache_size=host_bytes,
    )
    return EngineConfig(kv_cache_config=kv, torch_threads=1, **settings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's `LOOPS` say whether its engines wait for every pass, or do not, or both."""
    loops = getattr(metafunc.module, "LOOPS", ())
    if "loop" in metafunc.fixturenames and loops:
        metafunc.parametrize("loop", loops, indirect=True)


LONG_LAUNCH = 24
"""Tokens of a pass that counts as one that takes long to launch, where passes run ahead."""


@pytest.fixture
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU no pass runs ahead by itself, but the loop is the same: let it."""
    name: str = getattr(request, "param", "plain")
    if name == "overlapped":
        monkeypatch.setattr(PlainForward, "runs_ahead", True)
        monkeypatch.setattr(PlainForward, "is_quick", lambda _, counts: sum(counts) <= LONG_LAUNCH)
    return name


@pytest.fixture
def make_engine(model_path: ModelPath, loop: str) -> Iterator[MakeEngine]:
    """Builds engines as a replica does; `cache` shares blocks through the real connector."""
    engines: list[TorchEngine] = []

    def make(
        family: str = "llama",
        cache: CacheConfig | None = None,
        changes: dict[str, Any] | None = None,
        **settings: Any,
    ) -> TorchEngine:
        config = ReplicaConfig(
            name="replica",
            model=tiny_source(model_path(family, **(changes or {}))),
            engine=engine_config(**settings),
            cache=cache,
        )
        engines.append(build_torch_engine(config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def make_connected_engine(model_path: ModelPath, loop: str) -> Iterator[MakeEngine]:
    """Builds an engine around a connector pair of the test's own: `make(pair)`.

    `pair(pool)` gives the scheduler and the worker side.
    """
    engines: list[TorchEngine] = []

    def make(pair: Callable[[PagedPool], tuple[Any, Any]], **settings: Any) -> TorchEngine:
        source, config = tiny_source(model_path()), engine_config(**settings)
        model = load_model(source)
        layout = block_layout(model.config, BLOCK, "float32")
        pool = allocate_pool(layout, config.kv_cache_config.max_tokens // BLOCK, "cpu")
        connector = ConnectorDriver(*pair(pool))
        namespace = Namespace(source.name, source.revision, "torch", layout)
        thread = ComputeThread(config.torch_threads)
        engines.append(TorchEngine(thread, model, pool, namespace, config, connector))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


Greedy = Callable[..., list[int]]


@pytest.fixture(scope="session")
def plain_greedy(model_path: ModelPath) -> Greedy:
    """What plain transformers generates, token for token."""

    def greedy(
        prompt: list[int], num_tokens: int, family: str = "llama", **changes: Any
    ) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(model_path(family, **changes)).eval()
        inputs = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=num_tokens,
                do_sample=False,
            )
        return [int(token) for token in output[0, len(prompt) :]]

    return greedy


def request(
    prompt: list[int], num_tokens: int = 12, request_id: str = "request", **settings: Any
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=num_tokens, **settings)
    return GenerationRequest(request_id, tuple(prompt), sampling)


async def chunks(engine: TorchEngine, wanted: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(wanted)]


async def tokens(engine: TorchEngine, wanted: GenerationRequest) -> list[int]:
    return [token for chunk in await chunks(engine, wanted) for token in chunk.token_ids]


def some_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (num_tokens,), generator=generator).tolist()
