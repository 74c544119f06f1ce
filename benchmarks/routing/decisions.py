"""Measures what a routing decision costs, and how many a router actor serves.

    python -m benchmarks.routing.decisions --json benchmarks/results/routing-decisions.json

The index is filled with ten million blocks first, in about a minute; `--quick` takes a tenth. A
decision is `Router.route`: look-up, choice and booking of a prompt of 8,192 tokens on 64 replicas.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.cache_changes import Cursor, TierChanges
from actors.receipt import Receipt
from actors.router import Router
from actors.router_client import BatchingRouterClient
from actors.router_config import RouterConfig
from actors.router_messages import Finished, FirstToken, ReplicaInfo, RouteRequest
from actors.routing.index import KEY_BITS
from benchmarks.provenance import provenance
from cluster.clients import RAY_NAMESPACE, RayRouterClient
from cluster.demo.report import write_json
from cluster.router_actor import RouterActor
from shared_cache.hashing import BlockHash

BLOCK_TOKENS = 16
PROMPT_TOKENS = 8192
NUM_REPLICAS = 64
NUM_MACHINES = 8
NUM_BLOCKS = 10_000_000
MAX_OPEN = 128
"""Requests that run at a time, two for each replica."""

BATCH = 16
"""Requests that come in one message."""

NUM_CLIENTS = 2
CONCURRENCY = 64
FILL_TIMEOUT_S = 120.0
ROUTER_NAME = "bench-decisions"


def replicas() -> Iterator[ReplicaInfo]:
    for number in range(NUM_REPLICAS):
        yield ReplicaInfo(f"replica-{number}", "boot", f"machine-{number % NUM_MACHINES}", 400_000)


def random_keys(num_keys: int) -> "array[int]":
    words = array("Q", os.urandom(8 * num_keys))
    return array("Q", [word & (1 << KEY_BITS) - 1 for word in words])


class FilledRouter:
    """A router that knows `num_blocks` of random chains, each on a device and in host memory."""

    def __init__(self, num_blocks: int, routing_tokens: int, rng: random.Random) -> None:
        config = RouterConfig(index_blocks=num_blocks, routing_block_tokens=routing_tokens)
        self.router = Router(config, BLOCK_TOKENS, shares=True, rng=rng)
        self.chain_keys = PROMPT_TOKENS // routing_tokens
        self.chains: list[array[int]] = []
        self._rng = rng
        for info in replicas():
            self.router.register(info)
        self._settle()
        before = resident_bytes()
        self._fill(num_blocks)
        self.num_blocks = self.router.snapshot().index_blocks
        self.bytes_per_block = (resident_bytes() - before) / self.num_blocks

    def decision_us(self, num_prompts: int, known: float | None) -> tuple[float, float]:
        """Medians: of a decision, and of the upkeep that it causes for later.

        `known` is the part of each prompt that is in the caches; None: evenly from 0 to 1. Upkeep
        comes after every batch, as in the actor.
        """
        decisions, upkeep = [], []
        open_ids: list[int] = []
        for number in range(num_prompts):
            part = self._rng.random() if known is None else known
            request = RouteRequest(number, PROMPT_TOKENS, self._prompt(part))
            started_s = time.perf_counter()
            route = self.router.route(request)
            decisions.append(time.perf_counter() - started_s)
            assert route is not None
            open_ids.append(number)
            if len(open_ids) > MAX_OPEN:
                self._end(open_ids.pop(0))
            if number % BATCH == BATCH - 1:
                started_s = time.perf_counter()
                self._settle()
                upkeep.append((time.perf_counter() - started_s) / BATCH)
        for one in open_ids:
            self._end(one)
        return statistics.median(decisions) * 1e6, statistics.median(upkeep) * 1e6

    def _prompt(self, part: float) -> "array[int]":
        num_known = int(part * self.chain_keys)
        chain = self._rng.choice(self.chains)
        return chain[:num_known] + random_keys(self.chain_keys - num_known)

    def _end(self, request_id: int) -> None:
        receipt = Receipt(PROMPT_TOKENS, 0, 0, 0, PROMPT_TOKENS)
        self.router.take(FirstToken(request_id, receipt, 0.3))
        self.router.take(Finished(request_id))

    def _fill(self, num_blocks: int) -> None:
        index = self.router._knowledge.index
        names = [one.replica_id for one in replicas()]
        num_chains = int(1.4 * num_blocks / self.chain_keys)  # until the oldest make room
        for _ in range(num_chains):
            keys = random_keys(self.chain_keys)
            number = self._rng.randrange(NUM_REPLICAS)
            index.book(names[number], keys, {})
            if len(self.chains) < 2000:  # these are in host memory too
                index.add(f"arena of machine-{number % NUM_MACHINES}", keys)
                self.chains.append(keys)
            index.tidy(0.0, 1 << 20)

    def _settle(self) -> None:
        while not self.router.work_off():
            pass


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@ray.remote(num_cpus=0)
def ask(seconds: float, seed: int) -> int:
    """One ingress: asks, reports first token and end, as fast as it can; how many decisions."""
    rng = random.Random(seed)
    prefixes = [hashes(PROMPT_TOKENS // BLOCK_TOKENS, rng) for _ in range(50)]

    async def one(client: BatchingRouterClient, end_s: float) -> int:
        count = 0
        while time.perf_counter() < end_s:
            prompt = rng.choice(prefixes)[: rng.randrange(64, 512)]
            route = await client.route(prompt, PROMPT_TOKENS)
            assert route is not None
            client.first_token(route.request_id, Receipt(PROMPT_TOKENS, 0, 0, 0, PROMPT_TOKENS))
            client.finished(route.request_id, prompt)
            count += 1
        return count

    async def all_of_them() -> int:
        send = RayRouterClient(ROUTER_NAME).send
        client = BatchingRouterClient(send, 64 // BLOCK_TOKENS, fallback_after_s=10.0)
        end_s = time.perf_counter() + seconds
        counts = await asyncio.gather(*(one(client, end_s) for _ in range(CONCURRENCY)))
        assert client.num_fallbacks == 0
        return sum(counts)

    return asyncio.run(all_of_them())


def hashes(number: int, rng: random.Random) -> Sequence[BlockHash]:
    return [BlockHash(rng.randbytes(32)) for _ in range(number)]


def decisions_per_s(num_blocks: int, seconds: float) -> float:
    """Of one router actor that knows `num_blocks` of 64 tokens, asked by several processes."""
    config = RouterConfig(index_blocks=2 * num_blocks, routing_block_tokens=64)
    actor: Any = ray.remote(RouterActor).options(
        name=ROUTER_NAME, namespace=RAY_NAMESPACE, num_cpus=0
    )
    router = actor.remote(config, BLOCK_TOKENS, True, True)
    for info in replicas():
        ray.get(router.register.remote(info))
    share = num_blocks // NUM_REPLICAS
    for number in range(NUM_REPLICAS):
        changes = TierChanges("device", 0, Cursor("boot", 1), random_keys(share), is_snapshot=True)
        ray.get(router.learn.remote(f"replica-{number}", [changes]))
    give_up_s = time.monotonic() + FILL_TIMEOUT_S
    while ray.get(router.snapshot.remote()).index_blocks < share * NUM_REPLICAS * 0.95:
        if time.monotonic() > give_up_s:
            raise RuntimeError("the router did not take in its blocks in time")
        time.sleep(0.5)
    ray.get([ask.remote(1.0, number) for number in range(NUM_CLIENTS)])  # warms all up
    counts = ray.get([ask.remote(seconds, number) for number in range(NUM_CLIENTS)])
    ray.kill(router)
    return float(sum(counts) / seconds)


def measure(num_blocks: int = NUM_BLOCKS, num_prompts: int = 500) -> dict[str, Any]:
    """All figures; takes the whole machine for a minute or two."""
    fine = FilledRouter(num_blocks, BLOCK_TOKENS, random.Random(1))
    mixed_us, upkeep_us = fine.decision_us(num_prompts, None)
    known_us, _ = fine.decision_us(num_prompts, 1.0)
    new_us, _ = fine.decision_us(num_prompts, 0.0)
    figures = {
        "decision_us": mixed_us,
        "decision_known_prompt_us": known_us,
        "decision_new_prompt_us": new_us,
        "upkeep_us": upkeep_us,
        "index_blocks": fine.num_blocks,
        "index_bytes_per_block": fine.bytes_per_block,
    }
    del fine
    coarse = FilledRouter(num_blocks * BLOCK_TOKENS // 64, 64, random.Random(2))
    mixed_us, upkeep_us = coarse.decision_us(num_prompts, None)
    figures |= {"decision_us_64_token_blocks": mixed_us, "upkeep_us_64_token_blocks": upkeep_us}
    num_coarse = coarse.num_blocks
    del coarse
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    figures["decisions_per_s"] = decisions_per_s(num_coarse, 5.0)
    ray.shutdown()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks")
    arguments = parser.parse_args()
    figures = measure(NUM_BLOCKS // 10 if arguments.quick else NUM_BLOCKS)
    for name, value in figures.items():
        print(f"{name:32} {value:12,.1f}")
    if arguments.json:
        write_json(figures | provenance(), arguments.json)


if __name__ == "__main__":
    main()
