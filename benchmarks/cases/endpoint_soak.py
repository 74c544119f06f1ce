"""More than can be served, for minutes: no other no than 429, and nothing is left over."""

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from benchmarks.cases.endpoint_cluster import HOST, Measured, Port, deployed
from benchmarks.cases.http_load import Connection, hammer
from cluster.app import application
from cluster.clients import RAY_NAMESPACE
from cluster.config import ClusterConfig
from cluster.models import resolve_model

NAME = "endpoint-soak"
PATH = "/v1/completions"
PLACES = 16
OVERLOAD = 1.5
NUM_DOCUMENTS = 12
MAX_TOKENS = 16
NUM_CALIBRATION = 60
SETTLED_SHARE = 0.2
"""Of the soak, after which memory is looked at first: caches and pools are full by then."""

IDLE_TIMEOUT_S = 60.0

PROCESSES = (f"ray::ServeReplica:{NAME}", "ray::EngineReplica", "ray::RouterActor")


@dataclass(slots=True)
class _Traffic:
    """Requests about a few documents, some cut off by their client."""

    model: str
    dice: random.Random = field(default_factory=lambda: random.Random(7))

    def body(self) -> dict[str, Any]:
        document = self.dice.randrange(NUM_DOCUMENTS)
        text = f"Document {document}. " + f"Sentence {document} of many says little. " * 20
        question = f"Question {self.dice.randrange(1000)}?"
        stream = self.dice.random() < 0.5
        return {
            "model": self.model,
            "prompt": text + question,
            "max_tokens": MAX_TOKENS,
            "temperature": 0.7,
            "stream": stream,
            "ignore_eos": True,
        }


async def measure(seconds: float, model_name: str) -> Measured:
    """The soak on the embedded engine, two replicas that share an arena and a store."""
    model = resolve_model(model_name)

    def config(folder: str) -> ClusterConfig:
        kv = {"tokens_per_block": 32, "max_tokens": 8192}
        return ClusterConfig(
            name=NAME,
            model=model.name,
            num_cpus_per_replica=0.5,
            engine={"torch_threads": 1, "max_batch_size": 8, "kv_cache_config": kv},
            cache={"store": f"{folder}/store", "host": {"bytes": "256MiB"}},
            serve={"port": Port.number, "max_places": PLACES},
        )

    with deployed(lambda folder: application(config(folder), model), NAME):
        traffic = _Traffic(model.name)
        took_s, answers = await hammer(
            HOST, Port.number, PATH, lambda _: traffic.body(), NUM_CALIBRATION, PLACES
        )
        assert {one.status for one in answers} <= {200, 429}, answers[0].body
        capacity = sum(one.status == 200 for one in answers) / took_s
        result = await _soak(traffic, seconds, OVERLOAD * capacity)
        names = ClusterConfig(name=NAME, model=model.name).replica_names
        leases, slots, outstanding = await _left_over(names)
    counts = result.counts
    figures = {
        "requests": sum(counts.values()),
        "errors_other_than_429": sum(
            number for status, number in counts.items() if status not in ("200", "429", "left")
        ),
        "leaked_leases": leases,
        "leaked_slots": slots + outstanding,
        "rss_growth_mib": round(result.rss_growth_mib, 1),
    }
    details = {
        "seconds": seconds,
        "capacity_requests_per_s": capacity,
        "offered_requests_per_s": OVERLOAD * capacity,
        "statuses": dict(counts),
        "rss_mib": result.rss_mib,
    }
    return Measured(figures, details)


@dataclass(slots=True)
class _Result:
    counts: Counter[str] = field(default_factory=Counter)
    rss_mib: list[tuple[float, float]] = field(default_factory=list)

    @property
    def rss_growth_mib(self) -> float:
        """From the settled beginning to the end, each as the median of a few looks."""
        sizes = [size for _, size in self.rss_mib]
        settled = sizes[int(len(sizes) * SETTLED_SHARE) :]
        few = max(1, len(settled) // 8)
        first, last = sorted(settled[:few]), sorted(settled[-few:])
        return last[few // 2] - first[few // 2]


async def _soak(traffic: _Traffic, seconds: float, per_s: float) -> _Result:
    result, tasks = _Result(), set()
    idle: list[Connection] = []
    started_s = next_s = time.monotonic()
    looked_s = 0.0
    while (now_s := time.monotonic()) < started_s + seconds:
        if now_s - looked_s >= max(1.0, seconds / 120):
            looked_s = now_s
            result.rss_mib.append((now_s - started_s, _rss_mib()))
        if now_s >= next_s:
            next_s += traffic.dice.expovariate(per_s)
            task = asyncio.create_task(_one(traffic, idle, result.counts))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0.0, min(0.05, next_s - time.monotonic())))
    await asyncio.gather(*tasks)
    for one in idle:
        one.close()
    return result


async def _one(traffic: _Traffic, idle: list[Connection], counts: Counter[str]) -> None:
    connection = idle.pop() if idle else Connection(HOST, Port.number)
    leaves = traffic.dice.random() < 0.05
    asked = asyncio.create_task(connection.post(PATH, traffic.body()))
    try:
        patience_s = traffic.dice.random() if leaves else None
        answer = await asyncio.wait_for(asked, patience_s)
    except asyncio.TimeoutError:
        counts["left"] += 1
        connection.close()
        return
    except (OSError, asyncio.IncompleteReadError) as error:
        counts[type(error).__name__] += 1
        connection.close()
        return
    is_broken = b'"error"' in answer.body and answer.status == 200
    counts["broken stream" if is_broken else str(answer.status)] += 1
    idle.append(connection)


async def _left_over(names: tuple[str, ...]) -> tuple[int, int, int]:
    """Leases, slots in use and requests once everything has ended."""
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        handles = [ray.get_actor(name, namespace=RAY_NAMESPACE) for name in names]
        stats = await asyncio.gather(*[one.stats.remote() for one in handles])
        leases = max(one.cache.host.leased_slots for one in stats)
        outstanding = sum(one.num_outstanding for one in stats)
        slots = sum(one.engine.kv_cache.used_num_blocks for one in stats)
        is_clean = not (leases or outstanding or slots)
        if is_clean or time.monotonic() > deadline_s:
            return leases, slots, outstanding
        await asyncio.sleep(0.5)


def _rss_mib() -> float:
    """Memory of the endpoint's and the replicas' processes, what they share counted once each."""
    pages = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text()
            sizes = (folder / "statm").read_text().split()
        except OSError:  # it has ended meanwhile
            continue
        if line.startswith(PROCESSES):
            pages += int(sizes[1]) - int(sizes[2])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
