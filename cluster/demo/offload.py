"""Scenario `offload`: blocks that the device has no room for are kept in host memory, not lost.

The device pool holds one request. Prompts A, B, A, B evict one another; without a host tier
nothing is ever found again, with it the second A and the second B are.
"""

from dataclasses import asdict, dataclass
from typing import Any

from actors.engine import KvCacheStats
from cluster.demo.asking import Answer, ask
from cluster.demo.documents import load_documents
from cluster.demo.scenario import Demo, greedy
from cluster.demo.setups import kv_cache_bytes, setup

PATTERN = "ABAB"


@dataclass(frozen=True, slots=True)
class OffloadFigures:
    """One of the two modes: TensorRT-LLM's statistics, and times to first token in order."""

    reused_blocks: int
    missed_blocks: int
    cache_hit_rate: float
    ttft_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OffloadResult:
    """Both modes."""

    disabled: OffloadFigures
    enabled: OffloadFigures
    identical_output: bool

    def as_json(self) -> dict[str, Any]:
        """The figures, with the issue's names."""
        return asdict(self)

    def summary(self) -> str:
        """The outcome in words for somebody new to all this."""
        return (
            "When the device has no room, blocks go to host memory instead of being lost: "
            f"{self.disabled.reused_blocks} blocks were used again without it, "
            f"{self.enabled.reused_blocks} with it ({self.enabled.cache_hit_rate:.0%} of all)."
        )

    def failures(self) -> list[str]:
        """The expectations that were not met."""
        found = []
        if self.disabled.reused_blocks != 0:
            found.append(
                f"without offloading {self.disabled.reused_blocks} blocks were reused, not 0"
            )
        if self.enabled.reused_blocks < 1:
            found.append("with offloading no blocks were reused")
        if not self.identical_output:
            found.append("offloading changed an output")
        return found


async def run_offload(demo: Demo) -> OffloadResult:
    """Run the scenario; prints its steps as they happen."""
    demo.screen.scenario(
        "offload: host memory behind a device pool that is too small",
        "The pool holds one request; the prompts A, B, A, B push each other out of it. With a host "
        "tier, what is pushed out is kept there and loaded when its prompt comes again.",
    )
    prompts = _prompts(demo)
    disabled, plain_answers = await _run(demo, prompts, None)
    pool_bytes = kv_cache_bytes(demo.model, demo.config.engine, demo.sizes.offload.pool_tokens)
    enabled, offload_answers = await _run(demo, prompts, 4 * pool_bytes)
    same = [one.token_ids for one in plain_answers] == [one.token_ids for one in offload_answers]
    result = OffloadResult(disabled, enabled, same)
    _print_result(demo, result)
    return result


def _prompts(demo: Demo) -> dict[str, tuple[int, ...]]:
    """Two texts of the same number of tokens without a common beginning, as plain text."""
    first, second = load_documents()[:2]
    length = demo.sizes.offload.prompt_tokens
    return {
        "A": demo.prompts.text(f"{first.title}. {first.text}", length),
        "B": demo.prompts.text(f"On {second.title}. {second.text}", length),
    }


async def _run(
    demo: Demo, prompts: dict[str, tuple[int, ...]], host_cache_size: int | None
) -> tuple[OffloadFigures, list[Answer]]:
    mode = "with" if host_cache_size else "without"
    sizes = demo.sizes.offload
    pool = {
        "max_tokens": sizes.pool_tokens,
        "enable_block_reuse": True,
        "host_cache_size": host_cache_size,
    }
    engine = {"kv_cache_config": pool, "speculative_config": None}
    config = setup(demo.config, "offload", 1, cache=None, engine=engine)
    answers = []
    demo.screen.note(f"{mode.capitalize()} offloading, a pool of {sizes.pool_tokens} tokens:")
    async with demo.serve(config) as serving:
        for number, name in enumerate(PATTERN, start=1):
            request = greedy(f"{mode}-{number}", prompts[name], sizes.output_tokens)
            answer = await ask(serving.dispatcher, request)
            answers.append(answer)
            demo.screen.step(
                number,
                f"prompt {name}: {answer.receipt.cached} of {answer.receipt.prompt_tokens} tokens "
                f"from the cache, first token after {answer.ttft_s:.3f} s",
            )
        (stats,) = await serving.stats()
        assert stats.engine is not None, "a replica that answers has an engine"
    ttft_s = tuple(answer.ttft_s for answer in answers)
    return _figures(stats.engine.kv_cache, ttft_s), answers


def _figures(stats: KvCacheStats, ttft_s: tuple[float, ...]) -> OffloadFigures:
    return OffloadFigures(stats.reused_blocks, stats.missed_blocks, stats.cache_hit_rate, ttft_s)


def _print_result(demo: Demo, result: OffloadResult) -> None:
    rows = [
        (
            mode,
            str(one.reused_blocks),
            f"{one.cache_hit_rate:.2f}",
            f"{sum(one.ttft_s[2:]) / 2:.3f} s",
        )
        for mode, one in (
            ("Without Offloading", result.disabled),
            ("With Offloading", result.enabled),
        )
    ]
    columns = ("Mode", "reused blocks", "cache hit rate", "TTFT, second A and B")
    demo.screen.line()
    demo.screen.table("A, B, A, B with a pool for one request", columns, rows)
    good = not result.failures()
    demo.screen.verdict(
        good, "Evicted blocks came back from host memory" if good else "; ".join(result.failures())
    )
