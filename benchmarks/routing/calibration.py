"""Is the simulator right? The demo's `load` scenario, measured on a real cluster and simulated.

First the embedded engine is measured on the running cluster, both replicas busy at once as in the
traffic: prefill of several lengths, decode steps of one and of three requests. Then the scenario is
run, and then simulated with these constants and the same conversations.

    python -m benchmarks.routing.calibration --json benchmarks/results/routing-calibration.json
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.engine import GenerationRequest, SamplingParams
from benchmarks.provenance import provenance
from benchmarks.routing.cells import OURS
from benchmarks.routing.figures import Figures, summarise
from benchmarks.routing.hardware import Hardware
from benchmarks.routing.scenario import Scenario
from benchmarks.routing.simulation import Simulation
from benchmarks.routing.workload import Arrival
from cluster.demo.__main__ import parse_arguments, prepare
from cluster.demo.asking import Asks
from cluster.demo.console import Screen
from cluster.demo.documents import load_documents
from cluster.demo.load import REPLICAS, LoadResult, run_load
from cluster.demo.report import write_json
from cluster.demo.runtime import ray_session
from cluster.demo.scenario import Demo
from cluster.demo.setups import kv_cache_bytes, setup
from cluster.demo.traffic import ClientScript, plan_traffic
from shared_cache.hashing import block_hashes

PREFILL_TOKENS = (64, 192, 320, 448)
DECODE_TOKENS = 24
ROUNDS = 2
MEMORY_BYTES_S = 4e9
"""Host memory to the pool and back; of no weight beside prefill on a CPU."""
ALLOWED_ERROR = 0.25


@dataclass(frozen=True, slots=True)
class Constants:
    """What one replica takes while the other one is as busy, in seconds."""

    prefill_base_s: float
    prefill_token_s: float
    step_s: float
    kv_read_s: float


async def measure(demo: Demo) -> Constants:
    """The engine's constants on a cluster like that of the scenario, without reuse."""
    block = demo.config.engine.kv_cache_config.tokens_per_block
    pool = {
        "max_tokens": demo.sizes.load.pool_tokens(block) * 2,
        "host_cache_size": None,
        "enable_block_reuse": False,
    }
    engine = {"kv_cache_config": pool, "speculative_config": None}
    router = {"policy": "round_robin"}
    config = setup(demo.config, "constants", REPLICAS, engine=engine, cache=None, router=router)
    async with demo.serve(config) as serving:
        ask = partial(_timed, serving.dispatcher)
        await asyncio.gather(*(ask(64, 2, tag) for tag in range(2 * REPLICAS)))  # warm
        prefills = []
        for length in PREFILL_TOKENS * ROUNDS:
            both = await asyncio.gather(*(ask(length, 1, tag) for tag in range(REPLICAS)))
            prefills.extend((length, first_s) for first_s, _ in both)
        steps = []
        for each in (1, 3):
            timed = await asyncio.gather(
                *(ask(192, DECODE_TOKENS, tag) for tag in range(each * REPLICAS))
            )
            steps.append((each * (192 + DECODE_TOKENS / 2), min(step_s for _, step_s in timed)))
    base_s, token_s = _line(prefills)
    step_s, kv_read_s = _line(steps)
    return Constants(base_s, token_s, step_s, kv_read_s)


async def _timed(dispatcher: Asks, length: int, output: int, tag: int) -> tuple[float, float]:
    """Seconds to the first token, and of each step after it."""
    start = tag * 7919 + length
    prompt = tuple(100 + (start + position * 31) % 20_000 for position in range(length))
    sampling = SamplingParams(max_tokens=output, ignore_eos=True)
    request = GenerationRequest(f"{length}-{tag}", prompt, sampling)
    started_s = time.perf_counter()
    stream = dispatcher.generate(request)
    arrivals = [time.perf_counter() async for routed in stream if routed.chunk.token_ids]
    steps = max(1, output - 1)
    return arrivals[0] - started_s, (arrivals[-1] - arrivals[0]) / steps


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least squares, neither below 0."""
    count = len(points)
    mean_x, mean_y = (sum(one[axis] for one in points) / count for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)
    return max(0.0, mean_y - slope * mean_x), slope


class Schedule:
    """The scenario's conversations as arrivals: each turn comes when the one before has ended."""

    def __init__(self, demo: Demo, reuse: bool) -> None:
        self._demo = demo
        self._reuse = reuse
        self._block = demo.config.engine.kv_cache_config.tokens_per_block
        self._numbers: dict[bytes, int] = {}

    def arrivals(self, scripts: Sequence[ClientScript]) -> list[Arrival]:
        """All turns of all clients."""
        found: list[Arrival] = []
        for client, script in enumerate(scripts):
            after: int | None = None
            for prompt in self._prompts(script):
                found.append(self._arrival(prompt, client, after))
                after = len(found) - 1
        return found

    def _prompts(self, script: ClientScript) -> list[tuple[int, ...]]:
        """Answers are not known here; what stands for them is as long and decides no match."""
        sizes, prompts = self._demo.sizes.load, self._demo.prompts
        found = []
        for conversation in script.conversations:
            text = prompts.cut(conversation.document.text, sizes.document_tokens)
            messages: list[Any] = []
            for turn, question in enumerate(conversation.questions):
                asked = f"{text}\n\n{question}" if turn == 0 else question
                messages.append({"role": "user", "content": asked})
                found.append(prompts.chat(messages))
                answer = prompts.cut(f"{question} {text}", sizes.output_tokens)
                messages.append({"role": "assistant", "content": answer})
        return found

    def _arrival(self, prompt: tuple[int, ...], client: int, after: int | None) -> Arrival:
        full = (len(prompt) - 1) // self._block if self._reuse else 0
        hashes = block_hashes(prompt, self._block)[:full]
        blocks = tuple(self._numbers.setdefault(one, len(self._numbers)) for one in hashes)
        output = self._demo.sizes.load.output_tokens
        return Arrival(0.0, len(prompt), output, blocks, client, after)


def simulate(demo: Demo, constants: Constants) -> dict[str, Figures]:
    """The three modes of the scenario."""
    sizes, engine = demo.sizes.load, demo.config.engine
    block = engine.kv_cache_config.tokens_per_block
    scripts = plan_traffic(
        load_documents()[: sizes.num_documents],
        demo.options.seed,
        sizes.num_clients,
        sizes.conversations_per_client,
        sizes.turns_per_conversation,
    )
    found = {}
    for mode, policy in (("none", "round_robin"), ("local", "round_robin"), ("shared", OURS)):
        reserve = 2 * sizes.num_documents * sizes.request_tokens if mode == "shared" else 0
        hardware = Hardware(
            prefill_base_s=constants.prefill_base_s,
            prefill_token_s=constants.prefill_token_s,
            prefill_pair_s=0.0,
            step_s=constants.step_s,
            chunk_s=constants.prefill_base_s + constants.prefill_token_s * engine.max_num_tokens,
            kv_read_s=constants.kv_read_s,
            chunk_tokens=engine.max_num_tokens,
            kv_token_bytes=kv_cache_bytes(demo.model, engine, 1),
            device_tokens=sizes.pool_tokens(block),
            host_tokens=reserve,
            host_bytes_s=MEMORY_BYTES_S,
            replicas_per_host=REPLICAS,
            tokens_per_block=block,
        )
        arrivals = Schedule(demo, reuse=mode != "none").arrivals(scripts)
        found[mode] = summarise(Simulation(Scenario(policy, REPLICAS, hardware), arrivals).run())
    return found


def compare(measured: LoadResult, simulated: dict[str, Figures]) -> dict[str, dict[str, float]]:
    """Means and medians of each mode, and the error of the simulated mean."""
    return {
        mode: {
            "measured_mean_s": measured.modes[mode].ttft_mean_s,
            "simulated_mean_s": one.ttft_mean_s,
            "error": one.ttft_mean_s / measured.modes[mode].ttft_mean_s - 1,
            "measured_p50_s": measured.modes[mode].ttft_p50_s,
            "simulated_p50_s": one.ttft_p50_s,
            "measured_computed_tokens": measured.modes[mode].prefill_tokens_computed,
            "simulated_hit_rate": one.hit_rate,
        }
        for mode, one in simulated.items()
    }


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """The comparison, with a verdict for each mode."""
    table = Table("mode", "measured mean", "simulated", "error", "measured p50", "simulated")
    for mode, row in rows.items():
        table.add_row(
            mode,
            f"{row['measured_mean_s']:.2f} s",
            f"{row['simulated_mean_s']:.2f} s",
            f"{row['error']:+.0%}{'' if abs(row['error']) <= ALLOWED_ERROR else ' (too far)'}",
            f"{row['measured_p50_s']:.2f} s",
            f"{row['simulated_p50_s']:.2f} s",
        )
    Console().print(table)


def main() -> None:
    """Measure, simulate, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="the scenario's small sizes")
    options = parser.parse_args()
    demo_options = ["--scenario", "load", *(["--quick"] if options.quick else [])]
    demo = prepare(parse_arguments(demo_options), Screen())
    with ray_session():
        constants = asyncio.run(measure(demo))
        measured = asyncio.run(run_load(demo))
    rows = compare(measured, simulate(demo, constants))
    print_table(rows)
    if options.json:
        result = {**provenance(), "constants": asdict(constants), "modes": rows}
        write_json(result, options.json)


if __name__ == "__main__":
    main()
