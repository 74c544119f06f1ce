"""A trial of the real thing: engines that share a small cache, and what they find in it.

It answers on a GPU machine what sources cannot: do blocks come back, does a prompt that is loaded
say the same, is memory free afterwards. The same steps are the tests in `tests/gpu_trtllm`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from actors.config import ReplicaConfig
from actors.engine import GenerationRequest, Receipt, SamplingParams
from actors.findings import Finding
from actors.replica import EngineReplica
from actors.replica_health import ReplicaStats
from shared_cache.config import CacheConfig
from shared_cache.hashing import ReuseScope

PROMPT_BLOCKS = 40
OUTPUT_TOKENS = 48
LEAST_COMMON = 0.75
"""Part of an answer that must be equal with and without loading: sums are added up in another
order, so exact equality is not to be had."""

FLUSH_S = 120.0
HOST_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt brought."""

    receipt: Receipt
    tokens: tuple[int, ...]
    ttft_s: float


@dataclass(slots=True)
class Trial:
    """What two engines, one after the other on one store, did with one prompt."""

    cold: Answer | None = None
    again: Answer | None = None
    salted: Answer | None = None
    loaded: Answer | None = None
    stats: list[ReplicaStats] = field(default_factory=list)
    is_alive_after_abort: bool = False


async def run_trial(config: ReplicaConfig, store: Path) -> Trial:
    """Run both engines; whatever goes wrong is raised. `store` is an empty folder."""
    trial = Trial()
    config = config.model_copy(update={"cache": _trial_cache(config, store)})
    tokens = trial_prompt(PROMPT_BLOCKS * config.engine.kv_cache_config.tokens_per_block + 1)
    async with _replica(config) as first:
        trial.cold = await _ask(first, tokens)
        trial.again = await _ask(first, tokens)
        trial.salted = await _ask(first, tokens, ReuseScope("trial"))
        await _abort(first, tokens)
        trial.is_alive_after_abort = bool((await _ask(first, tokens)).tokens)
        trial.stats.append(await first.stats())
        if not await first.flush(FLUSH_S):
            raise TimeoutError(f"saves were not written within {FLUSH_S:g} s; is the disk full?")
    async with _replica(config) as second:
        trial.loaded = await _ask(second, tokens)
        trial.stats.append(await second.stats())
    return trial


def trial_prompt(num_tokens: int) -> tuple[int, ...]:
    """Token ids that every vocabulary has, the same each time, in no short cycle."""
    return tuple(1000 + (i * 7919) % 20011 for i in range(num_tokens))


def judge(trial: Trial, tokens_per_block: int) -> list[Finding]:
    """What the trial shows, and what to do where it shows something bad."""
    cold, again, salted, loaded = trial.cold, trial.again, trial.salted, trial.loaded
    assert cold is not None
    assert again is not None
    assert salted is not None
    assert loaded is not None
    size = PROMPT_BLOCKS * tokens_per_block
    common = common_part(cold.tokens, loaded.tokens)
    return [
        _expect("a first prompt is computed", cold.receipt.cached == 0, _told(cold)),
        _expect("its repetition is on the device", again.receipt.device >= size, _told(again)),
        _expect("another salt finds nothing", salted.receipt.cached == 0, _told(salted)),
        _expect("an abort leaves the engine well", trial.is_alive_after_abort, "it answers"),
        _expect(
            "a second engine loads it",
            loaded.receipt.cached - loaded.receipt.device >= size,
            f"{_told(loaded)}; when nothing was: docs/tensorrt-llm.md, section on a hit rate of 0",
        ),
        _expect(
            "and says the same", common >= LEAST_COMMON, f"{common:.0%} of the answer in common"
        ),
        Finding(
            "time to first token",
            "ok" if loaded.ttft_s < cold.ttft_s else "warn",
            f"{cold.ttft_s:.3f} s computed, {loaded.ttft_s:.3f} s loaded",
        ),
    ]


def common_part(one: Sequence[int], other: Sequence[int]) -> float:
    """The part of the shorter answer that both begin with."""
    length = min(len(one), len(other))
    same = next((i for i in range(length) if one[i] != other[i]), length)
    return same / length if length else 1.0


def _expect(name: str, is_so: bool, text: str) -> Finding:
    return Finding(name, "ok" if is_so else "fail", text)


def _told(answer: Answer) -> str:
    told = answer.receipt
    return (
        f"device {told.device}, host {told.host}, shared {told.shared}, computed {told.computed} "
        f"of {told.prompt_tokens} tokens"
    )


def _trial_cache(config: ReplicaConfig, store: Path) -> CacheConfig:
    """A small cache of the trial's own: nobody's blocks are touched, and all are loaded."""
    is_alone = config.engine.tensor_parallel_size == 1
    host = (
        {"bytes": HOST_BYTES, "scope": "process"}
        if is_alone
        else {
            "bytes": HOST_BYTES,
            "name": f"trial-{store.name}",
        }
    )
    return CacheConfig.model_validate(
        {
            "store": f"file://{store}",
            "host": host,
            "cost": {"gate": False},
            "staging_deadline_s": 30.0,
            "save_queue_bytes": HOST_BYTES // 2,
        }
    )


@asynccontextmanager
async def _replica(config: ReplicaConfig) -> AsyncIterator[EngineReplica]:
    replica = EngineReplica(config)
    try:
        await replica.ready()
        yield replica
    finally:
        await replica.close()


async def _ask(
    replica: EngineReplica, tokens: tuple[int, ...], scope: ReuseScope | None = None
) -> Answer:
    begun_s, first_s = time.monotonic(), 0.0
    receipt: Receipt | None = None
    said: list[int] = []
    async for chunk in replica.generate(_request(tokens, scope)):
        if receipt is None:
            receipt, first_s = chunk.receipt, time.monotonic()
        said.extend(chunk.token_ids)
    assert receipt is not None, "the first chunk has no receipt"
    return Answer(receipt, tuple(said), first_s - begun_s)


async def _abort(replica: EngineReplica, tokens: tuple[int, ...]) -> None:
    async with aclosing(replica.generate(_request(tokens[::-1], None))) as stream:
        await anext(stream)
    await asyncio.sleep(0)


def _request(tokens: tuple[int, ...], scope: ReuseScope | None) -> GenerationRequest:
    sampling = SamplingParams(OUTPUT_TOKENS, ignore_eos=True)
    return GenerationRequest("trial", tokens, sampling, scope or ReuseScope())
