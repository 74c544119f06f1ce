"""Time between the tokens of running requests, with and without loads and saves beside them.

Some requests decode all the time; that alone is the first phase. In the second one other requests
come one after the other: long prompts that another replica has saved, each evicted from the device
since, so that each is loaded from host memory; the running requests' own blocks are saved as they
fill up. In the third one the same prompts come from the device's own memory: what they cost beside
the copies. So there are two ratios: of the second phase to the first, and to the third, which is
what the copies alone are to blame for.

    python -m benchmarks.gpu.itl --json FILE
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

from actors.config import ReplicaConfig
from actors.replica import EngineReplica
from benchmarks.cases.arena import host_config, owned, shared_folder
from benchmarks.gpu.workbench import (
    TINY,
    TOKENS_PER_BLOCK,
    Answer,
    arguments,
    ask,
    engine_config,
    percentile,
    random_prompt,
    replica_config,
    report,
    scratch,
    shape,
    write_model,
)
from shared_cache.config import CacheConfig, CostConfig

GIB = 1 << 30
NUM_PROMPTS = 4

Work = Callable[[EngineReplica], Awaitable[dict[str, Any]]]


class Intruders:
    """One request after the other, each one token long, until told to stop."""

    def __init__(self, replica: EngineReplica, prompts: Sequence[Sequence[int]]) -> None:
        self._replica = replica
        self._prompts = prompts
        self._is_over = False
        self.answers: list[Answer] = []

    async def run(self) -> None:
        for index, prompt in enumerate(cycle(self._prompts)):
            if self._is_over:
                return
            self.answers.append(await ask(self._replica, prompt, 1, f"intruder-{index}"))

    def stop(self) -> None:
        self._is_over = True


@dataclass(frozen=True, slots=True)
class Traffic:
    """What became of running and of other requests; all of the former decode from `first_s` on.

    They do so until `end_s`; both are times of `time.perf_counter`.
    """

    answers: Sequence[Answer]
    others: Sequence[Answer]
    first_s: float
    end_s: float

    def figures(self) -> dict[str, Any]:
        """Gaps between tokens of all running requests, while all of them decode."""
        gaps = [
            after - before
            for answer in self.answers
            for before, after in pairwise(answer.arrivals_s)
            if self.first_s <= before and after <= self.end_s
        ]
        receipts = [answer.receipt for answer in self.others]
        return {
            "median_ms": statistics.median(gaps) * 1000,
            "mean_ms": statistics.mean(gaps) * 1000,
            "p99_ms": percentile(gaps, 99) * 1000,
            "max_ms": max(gaps) * 1000,
            "gaps": len(gaps),
            "loaded_tokens": sum(receipt.host for receipt in receipts),
            "device_tokens": sum(receipt.device for receipt in receipts),
            "intruders": len(receipts),
        }


async def traffic(
    replica: EngineReplica, options: Any, seed: int, intruding: Sequence[Sequence[int]]
) -> Traffic:
    """Serve `options.running` new prompts to their end, and `intruding` ones beside them."""
    prompts = [random_prompt(options.context, seed + i, shape()) for i in range(options.running)]
    running = [
        asyncio.create_task(ask(replica, prompt, options.steps, f"running-{seed}-{i}"))
        for i, prompt in enumerate(prompts)
    ]
    intruders = Intruders(replica, intruding)
    task = asyncio.create_task(intruders.run()) if intruding else None
    answers = await asyncio.gather(*running)
    intruders.stop()
    if task is not None:
        await task
    first_s = max(answer.arrivals_s[0] for answer in answers)
    end_s = min(answer.arrivals_s[-1] for answer in answers)
    return Traffic(answers, intruders.answers, first_s, end_s)


async def phase(
    replica: EngineReplica, options: Any, seed: int, intruding: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The figures of one phase, and how long it took."""
    start_s = time.perf_counter()
    found = await traffic(replica, options, seed, intruding)
    return {**found.figures(), "seconds": found.end_s - start_s}


async def saved_prompts(replica: EngineReplica, options: Any) -> list[tuple[int, ...]]:
    """Prompts that are in host memory; more than the device holds beside running requests."""
    length = options.prompt - options.prompt % TOKENS_PER_BLOCK + 1
    prompts = [random_prompt(length, 10 + i, shape()) for i in range(NUM_PROMPTS)]
    await replica.ready()
    for prompt in prompts:
        await ask(replica, prompt, 1, "save")
    if not await replica.flush(120.0):
        raise SystemExit("the prompts were not saved in time")
    return prompts


async def measure(replica: EngineReplica, options: Any) -> dict[str, Any]:
    """The three phases, some rounds of each in turn; each figure is the median of its rounds."""
    prompts = await saved_prompts(replica, options)
    await phase(replica, options, 1, prompts)
    rounds: dict[str, list[dict[str, Any]]] = {"alone": [], "loads": [], "device": []}
    for index in range(options.rounds):
        seed = 1000 * (index + 1)
        rounds["alone"].append(await phase(replica, options, seed, ()))
        rounds["loads"].append(await phase(replica, options, seed + 100, prompts))
        rounds["device"].append(await phase(replica, options, seed + 200, prompts[:1]))
    return {name: combined(found) for name, found in rounds.items()}


def combined(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is asked, of requests that run and of those that come beside them."""
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of each loaded prompt")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)


@contextmanager
def replica_for(options: Any, name: str) -> Iterator[ReplicaConfig]:
    """A replica with room for the running requests and two prompts, and an arena's owner."""
    running_tokens = options.running * (options.context + options.steps + 64)
    pool_tokens = running_tokens + 2 * (options.prompt + 64)
    engine = engine_config(shape(), pool_tokens, max_batch_size=options.running + 4)
    num_bytes = 1 << 28 if shape() == TINY else 16 * GIB
    with scratch() as folder, shared_folder() as arenas:
        source = write_model(folder, shape())
        host = host_config(arenas, num_bytes).model_copy(
            update={"reserve_ahead": None, "populate": True}
        )
        with owned(host):
            cache = CacheConfig(host=host, cost=CostConfig(gate=False))
            yield replica_config(name, source, engine, cache)


async def run(config: ReplicaConfig, work: Work) -> dict[str, Any]:
    """What `work` finds with a replica of this configuration."""
    replica = EngineReplica(config)
    try:
        return await work(replica)
    finally:
        await replica.close()


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    with replica_for(options, "itl") as config:
        found = asyncio.run(run(config, lambda replica: measure(replica, options)))
    for name, figures in found.items():
        print(name, {key: round(value, 3) for key, value in figures.items()})
    ratios = {
        "itl_p99_ratio": found["loads"]["p99_ms"] / found["alone"]["p99_ms"],
        "itl_p99_ratio_of_copies": found["loads"]["p99_ms"] / found["device"]["p99_ms"],
    }
    print(ratios)
    report({"itl": found, **ratios}, options.json)


if __name__ == "__main__":
    main()
