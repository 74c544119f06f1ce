"""The fast path on a real GPU: three ways to attend agree, graphs replay what was captured."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.config import CudaGraphConfig, EngineConfig, KvCacheConfig, ReplicaConfig
from actors.engines.torch import varlen
from actors.engines.torch.batch import PackedBatch
from actors.engines.torch.build import build_torch_engine
from actors.engines.torch.cuda import kernels
from actors.engines.torch.engine import TorchEngine
from actors.engines.torch.forward import Forward, PlainForward
from actors.engines.torch.model import LoadedModel, block_layout, load_model
from actors.engines.torch.pool import PagedPool, QuerySpan, allocate_pool
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.hashing import block_hashes
from tests.engine.conftest import chunks, request, tokens
from tests.tiny_model import make_tiny_model, tiny_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
with_flashinfer = pytest.mark.skipif(not kernels.is_installed(), reason="no FlashInfer")

BLOCK = 32
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
}
FAR = 0.03
"""Relative difference of logits in bfloat16 that is still rounding: 8 bits, over 4 layers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("gpu"), "llama", **SHAPE)


@pytest.fixture
def make_gpu_engine(folder: Path) -> Iterator[Any]:
    engines: list[TorchEngine] = []

    def make(cache: CacheConfig | None = None, **settings: Any) -> TorchEngine:
        kv = KvCacheConfig(tokens_per_block=BLOCK, max_tokens=settings.pop("pool_tokens", 8192))
        engine = EngineConfig(device="cuda", kv_cache_config=kv, **settings)
        config = ReplicaConfig(name="gpu", model=tiny_source(folder), engine=engine, cache=cache)
        engines.append(build_torch_engine(config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def loaded(folder: Path, dtype: str) -> tuple[LoadedModel, PagedPool]:
    model = load_model(tiny_source(folder), dtype, "cuda")
    return model, allocate_pool(block_layout(model.config, BLOCK, dtype), 64, "cuda")


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (num_tokens,), generator=generator).tolist()


def batches() -> list[PackedBatch]:
    """A long prompt, chunks of two others, all three decoding, a tail beside decoding."""
    first, second, third = prompt(700, 1), prompt(90, 2), prompt(45, 3)
    slots = (range(23), range(30, 36), range(40, 43))
    return [
        PackedBatch(first, [QuerySpan(0, 700, slots[0])], [699]),
        PackedBatch(
            [*second[:64], *third[:44]],
            [QuerySpan(0, 64, slots[1]), QuerySpan(0, 44, slots[2])],
            [107],
        ),
        PackedBatch(
            [7, *second[64:], third[44]],
            [QuerySpan(700, 1, slots[0]), QuerySpan(64, 26, slots[1]), QuerySpan(44, 1, slots[2])],
            [0, 26, 27],
        ),
        PackedBatch(
            [8, 9, 10],
            [QuerySpan(701, 1, slots[0]), QuerySpan(90, 1, slots[1]), QuerySpan(45, 1, slots[2])],
            [0, 1, 2],
        ),
    ]


def logits_of_all(forward: Forward, pool: PagedPool) -> list[torch.Tensor]:
    with torch.inference_mode():
        forward.warm_up()
        pool.with_scratch.zero_()
        return [forward.logits(batch).float() for batch in batches()]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def exact(folder: Path) -> list[torch.Tensor]:
    """The same in float32, through transformers' layers."""
    model, pool = loaded(folder, "float32")
    return logits_of_all(PlainForward(model, pool), pool)


@pytest.mark.parametrize("way", ["sdpa", "flashinfer", "graphs", "varlen"])
def test_all_ways_compute_the_same(way: str, folder: Path, exact: list[torch.Tensor]) -> None:
    from actors.engines.torch.cuda.buckets import PassSizes
    from actors.engines.torch.cuda.forward import CudaForward

    if way in ("flashinfer", "graphs") and not kernels.is_installed():
        pytest.skip("no FlashInfer")
    if way == "varlen" and not varlen.has_block_table():
        pytest.skip(f"torch {torch.__version__} has no varlen_attn with a block table")
    model, pool = loaded(folder, "bfloat16")
    forward: Forward = PlainForward(model, pool)
    if way == "varlen":
        forward = PlainForward(model, pool, varlen.VarlenPass)
    elif way != "sdpa":
        sizes = PassSizes(4, 128) if way == "graphs" else None
        forward = CudaForward(model, pool, 2048, 4, sizes)
    found = logits_of_all(forward, pool)
    far = [distance(one, other) for one, other in zip(found, exact, strict=True)]
    assert max(far) < FAR, far
    assert not any(one.isnan().any() for one in found)


@with_flashinfer
async def test_the_next_token_hardly_depends_on_graphs_or_company(make_gpu_engine: Any) -> None:
    """In bfloat16 a batch may round otherwise, and of a random model's tokens some percent are
    near ties: one differs, and the answers go their own ways. So each step is asked alone, also
    behind an end token.
    """
    plain = make_gpu_engine(cuda_graph_config=None)
    graphs = make_gpu_engine(cuda_graph_config=CudaGraphConfig(max_num_tokens=64))
    steps, expected = [], []
    for i in range(6):
        beginning = prompt(40 + 37 * i, i)
        answer = await tokens(plain, request(beginning, 24, ignore_eos=True))
        for end in range(0, 24, 3):
            name = f"{i}-{end}"
            steps.append(request([*beginning, *answer[:end]], 1, name, ignore_eos=True))
            expected.append(answer[end : end + 1])
    found = await asyncio.gather(*[tokens(graphs, one) for one in steps])
    num_equal = sum(a == b for a, b in zip(found, expected, strict=True))
    assert num_equal > 0.9 * len(steps)


@with_flashinfer
async def test_running_ahead_changes_no_token(make_gpu_engine: Any) -> None:
    """The same passes, launched sooner: what one finds on the device is what the host would say."""
    graphs = CudaGraphConfig(max_num_tokens=64)
    plain = make_gpu_engine(cuda_graph_config=graphs, disable_overlap_scheduler=True)
    ahead = make_gpu_engine(cuda_graph_config=graphs)
    for alone in [request(prompt(20 + 50 * i, i), 120) for i in range(3)]:
        assert await tokens(ahead, alone) == await tokens(plain, alone)
    many = [request(prompt(30 + i, 10 + i), 20 + 7 * i, f"r{i}", ignore_eos=True) for i in range(8)]
    together = await asyncio.gather(*[tokens(ahead, one) for one in many])
    assert [len(one) for one in together] == [one.sampling.max_tokens for one in many]
    assert ahead.stats().kv_cache.used_num_blocks == 0


@with_flashinfer
async def test_blocks_that_were_loaded_ahead_are_found_on_the_device(make_gpu_engine: Any) -> None:
    host = HostConfig(scope="process", bytes=1 << 28)
    engine = make_gpu_engine(CacheConfig(host=host), pool_tokens=3072)
    wanted = request(prompt(2049, 1), 16)
    cold = await tokens(engine, wanted)
    engine.cache.flush(30.0)
    await tokens(engine, request(prompt(2049, 2), 2))  # evicts the first prompt
    hashes = block_hashes(wanted.prompt_token_ids, BLOCK)
    staged = engine.cache.lease(hashes, 0, wanted.scope)
    ahead = await engine.preload(wanted, 1024 // BLOCK)
    received = await chunks(engine, wanted)
    engine.cache.release(staged)
    receipt = received[0].receipt
    assert ahead.stop == 1024
    assert receipt.device >= 1024
    assert receipt.device + receipt.host == 2048
    found = [token for chunk in received for token in chunk.token_ids]
    assert common(found, cold) >= 8


async def test_a_hit_changes_no_greedy_token_in_float32(make_gpu_engine: Any) -> None:
    host = HostConfig(scope="process", bytes=1 << 28)
    engine = make_gpu_engine(
        CacheConfig(host=host), dtype="float32", attention="sdpa", pool_tokens=2048
    )
    asked = [request(prompt(1500, i), 24) for i in range(2)]
    cold = [await tokens(engine, one) for one in asked]
    engine.cache.flush(30.0)
    for one, expected in zip(asked, cold, strict=True):  # each evicts the other from the device
        hit = await with_staging(engine, one)
        receipt = hit[0].receipt
        assert receipt.host > 0
        assert receipt.device + receipt.host == 1472
        assert [token for chunk in hit for token in chunk.token_ids] == expected


@with_flashinfer
async def test_a_long_load_does_not_stop_who_decodes(make_gpu_engine: Any) -> None:
    """Loads beside running requests: all come back, nothing is left, each answer is as before."""
    host = HostConfig(scope="process", bytes=1 << 28)
    engine = make_gpu_engine(CacheConfig(host=host), pool_tokens=8192, max_batch_size=4)
    asked = [request(prompt(2048 + 32 * i, i), 8) for i in range(6)]
    cold = [await tokens(engine, one) for one in asked]
    engine.cache.flush(30.0)
    decoding = asyncio.create_task(tokens(engine, request(prompt(64, 99), 200)))
    for one, expected in zip(asked, cold, strict=True):
        hit = await with_staging(engine, one)
        found = [token for chunk in hit for token in chunk.token_ids]
        assert common(found, expected) >= 4
    assert len(await decoding) == 200
    assert engine.stats().kv_cache.used_num_blocks == 0
    assert engine._connector._worker.connector_faults == 0


async def with_staging(engine: TorchEngine, wanted: Any) -> list[Any]:
    """Stage as a replica does, then generate."""
    hashes = block_hashes(wanted.prompt_token_ids, BLOCK)
    first = engine.num_device_blocks(hashes)
    staged = engine.cache.lease(hashes, first, wanted.scope)
    try:
        return await chunks(engine, wanted)
    finally:
        engine.cache.release(staged)


def common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))
