"""Scenario `share`: what one replica has computed, another process need not compute again.

Replica 1 answers a long prompt and is destroyed; replica 2, a new process that has only the store,
answers the same prompt.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.engine import Receipt, TokenChunk
from cluster.config import ClusterConfig
from cluster.demo.asking import Answer, Asks, ask
from cluster.demo.documents import read_text
from cluster.demo.scenario import Demo, greedy
from cluster.demo.setups import fresh_cache, kv_cache_bytes, roomy_pool, setup

QUESTION = "Continue: who declares what in this document, and why?"


@dataclass(frozen=True, slots=True)
class ShareResult:
    """Blocks that the connector matched, and times to first token, at the caller."""

    prompt_tokens: int
    matched_blocks_first: int
    matched_blocks_second: int
    ttft_first_s: float
    ttft_second_s: float
    identical_output: bool

    @property
    def speedup(self) -> float:
        """How many times sooner the second replica's first token came."""
        return self.ttft_first_s / self.ttft_second_s

    def as_json(self) -> dict[str, Any]:
        """The figures, with the issue's names."""
        return asdict(self) | {"ttft_speedup": self.speedup}

    def summary(self) -> str:
        """The outcome in words for somebody new to all this."""
        return (
            "Before a model answers it reads the prompt, and that takes time: "
            f"{self.ttft_first_s:.2f} s for {self.prompt_tokens} tokens. What reading produces, "
            "the KV cache, was kept in blocks in a store. A new process loaded "
            f"{self.matched_blocks_second} blocks, began to answer after "
            f"{self.ttft_second_s:.2f} s ({self.speedup:.0f} times sooner), and said the same."
        )

    def failures(self) -> list[str]:
        """The expectations that were not met."""
        found = []
        if self.matched_blocks_first != 0:
            found.append(f"the first replica matched {self.matched_blocks_first} blocks, not 0")
        if self.matched_blocks_second < 1:
            found.append("the second replica matched no blocks of the first one's")
        if not self.identical_output:
            found.append("the two outputs differ")
        return found


async def run_share(demo: Demo) -> ShareResult:
    """Run the scenario; prints its steps as they happen."""
    screen = demo.screen
    screen.scenario(
        "share: faster prefill with the KV cache of another process",
        "A replica reads a long text and is destroyed. A new one is asked the same: it loads what "
        "the first one computed, instead of computing it again.",
    )
    prompt = _prompt(demo)
    with tempfile.TemporaryDirectory(prefix="kvcommons-demo-") as folder:
        reserve_bytes = 2 * kv_cache_bytes(demo.model, demo.config.engine, len(prompt))
        cache = fresh_cache(demo.config, Path(folder), reserve_bytes)
        pool = roomy_pool(demo.config, len(prompt) + demo.sizes.share_output_tokens)
        engine = {"kv_cache_config": pool, "speculative_config": None}
        config = setup(demo.config, "share", 1, cache=cache.model_dump(), engine=engine)
        first = await _first(demo, config, prompt)
        second = await _second(demo, config, prompt)
    block = demo.config.engine.kv_cache_config.tokens_per_block
    result = ShareResult(
        prompt_tokens=len(prompt),
        matched_blocks_first=matched_blocks(first.receipt, block),
        matched_blocks_second=matched_blocks(second.receipt, block),
        ttft_first_s=first.ttft_s,
        ttft_second_s=second.ttft_s,
        identical_output=first.token_ids == second.token_ids and first.text == second.text,
    )
    _print_result(demo, result)
    return result


def _prompt(demo: Demo) -> tuple[int, ...]:
    return demo.prompts.about(
        read_text("declaration.txt"),
        lambda text: demo.prompts.chat([{"role": "user", "content": f"{text}\n\n{QUESTION}"}]),
        demo.sizes.share_prompt_tokens,
    )


async def _first(demo: Demo, config: ClusterConfig, prompt: tuple[int, ...]) -> Answer:
    screen = demo.screen
    screen.step(1, "Creating first LLM instance...")
    async with demo.serve(config) as serving:
        screen.step(2, "Generating with first instance (computing KV cache)...")
        answer = await _answer(demo, serving.dispatcher, prompt, "First")
        screen.line()
        screen.step(3, "Destroying first LLM instance...")
        if not await serving.flush():
            screen.detail("not everything could be written to the store in time", "yellow")
    return answer


async def _second(demo: Demo, config: ClusterConfig, prompt: tuple[int, ...]) -> Answer:
    screen = demo.screen
    screen.step(4, "Creating second LLM instance (new instance, same connector)...")
    async with demo.serve(config) as serving:
        screen.line()
        screen.step(5, "Generating with second instance (should load cached blocks)...")
        return await _answer(demo, serving.dispatcher, prompt, "Second")


async def _answer(demo: Demo, dispatcher: Asks, prompt: tuple[int, ...], which: str) -> Answer:
    """Ask, and print what the connector matched as soon as the first token is there."""
    block = demo.config.engine.kv_cache_config.tokens_per_block

    def on_chunk(chunk: TokenChunk) -> None:
        if chunk.receipt is not None:
            matched = matched_blocks(chunk.receipt, block)
            hit = "   ← Cache hit!" if matched else ""
            demo.screen.detail(f"KV CONNECTOR: Matched {matched} blocks for request 0{hit}")

    request = greedy("0", prompt, demo.sizes.share_output_tokens)
    answer = await ask(dispatcher, request, on_chunk)
    demo.screen.detail(f"{which} output: {answer.text}")
    demo.screen.detail(f"Time to first token: {answer.ttft_s:.3f} s", "cyan")
    return answer


def matched_blocks(receipt: Receipt, tokens_per_block: int) -> int:
    """Blocks that came through the connector, from host memory or the shared tier."""
    return (receipt.host + receipt.shared) // tokens_per_block


def _print_result(demo: Demo, result: ShareResult) -> None:
    screen = demo.screen
    screen.line()
    screen.verdict(
        result.identical_output,
        "Both outputs are identical!" if result.identical_output else "the two outputs differ",
    )
    screen.note(
        f"Of {result.prompt_tokens} prompt tokens the second replica loaded "
        f"{result.matched_blocks_second} blocks; its first token came {result.speedup:.1f} times "
        "sooner."
    )
