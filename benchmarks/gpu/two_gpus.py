"""Replicas on several GPUs of one machine over one arena; without GPUs, as many processes.

Two replicas on the first device, one on every other one. Measured: a prompt that the first replica
saved, loaded on the same and on another device; all devices loading from the arena at once, against
what each link gives alone; requests a second of one replica and of one on every device, with the
same clients for each; bytes of host memory for each cached token.

    python -m benchmarks.gpu.two_gpus --json FILE
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.cases.arena import host_config, namespace, owned, shared_folder
from benchmarks.gpu.link import SIZE, Connector, Link, timed
from benchmarks.gpu.ttft import GIB, check, common_prefix
from benchmarks.gpu.workbench import (
    TINY,
    TOKENS_PER_BLOCK,
    ReplicaProcess,
    arguments,
    engine_config,
    median_ms,
    percentile,
    random_prompt,
    replica_config,
    report,
    scratch,
    shape,
    write_model,
)
from shared_cache.config import CacheConfig, CostConfig, HostConfig
from shared_cache.opening import open_cache

LOAD_ROUNDS = 40
ANSWER_TOKENS = 16
WAIT_S = 120.0


def num_gpus() -> int:
    """Devices to use; two processes where there is none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def hits(replicas: Sequence[ReplicaProcess], lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds to first token: cold on the first device, then loaded there and elsewhere."""
    first, same, *others = replicas
    found: dict[str, Any] = {}
    for length in lengths:
        seconds: dict[str, list[float]] = {"cold": [], "same_gpu": [], "other_gpu": []}
        prefixes = []
        for index in range(rounds):
            prompt = random_prompt(length, 31 * length + index, shape())
            cold = check(first.ask(prompt, ANSWER_TOKENS), "cold")
            seconds["cold"].append(cold.first_s)
            first.flush()
            for name, replica in (("same_gpu", same), ("other_gpu", others[0])):
                hit = check(replica.ask(prompt, ANSWER_TOKENS), "host")
                seconds[name].append(hit.first_s)
                prefixes.append(common_prefix(cold.tokens, hit.tokens))
        found[str(length)] = {name: median_ms(values) for name, values in seconds.items()}
        found[str(length)]["common_prefix_min"] = min(prefixes)
        print(length, found[str(length)], flush=True)
    return found


def throughput(replicas: Sequence[ReplicaProcess], options: Any, seed: int) -> dict[str, float]:
    """Requests a second when each replica has its clients; documents are shared by all.

    Every client asks new questions about documents that any replica may have saved.
    """
    documents = [random_prompt(options.document, seed + i, shape()) for i in range(8)]
    for document in documents:
        replicas[0].ask(document, 1)
    replicas[0].flush()
    start_s = time.perf_counter()
    for number, replica in enumerate(replicas):
        prompts = [
            (*documents[i % 8], *random_prompt(64, seed + 100 * number + i, shape()))
            for i in range(options.requests)
        ]
        replica.begin_clients(prompts, options.clients, options.answer)
    answers = [answer for replica in replicas for answer in replica.end_clients()]
    seconds = time.perf_counter() - start_s
    return {
        "requests_per_s": len(answers) / seconds,
        "ttft_p90_ms": percentile([answer.first_s for answer in answers], 90) * 1000,
        "computed_tokens": sum(answer.receipt.computed for answer in answers),
    }


def load_process(host: HostConfig, gpu: int | None, num_blocks: int, ours: Connection) -> None:
    """Answers "link" and "load" with GB/s of one device's copies from host memory."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    device = "cpu" if gpu is None else "cuda"
    space = namespace(SIZE)
    block_bytes = space.layout.block_bytes
    pool = torch.zeros((2 * num_blocks, block_bytes), dtype=torch.uint8, device=device)
    rows = torch.randperm(2 * num_blocks)[:num_blocks].tolist()
    finish = torch.cuda.synchronize if pool.is_cuda else lambda: None
    cache = open_cache(CacheConfig(host=host), space)
    link, connector = Link(pool, rows), Connector(cache, pool, rows)
    hashes = connector.prepare_save()
    connector.save()
    finish()
    staged = connector.prepare_load(hashes)  # the same blocks again and again
    copies = {"link": link.load, "load": connector.load}
    ours.send("ready")
    while (what := ours.recv()) is not None:
        seconds = timed(partial(repeat_call, copies[what]), finish)
        ours.send(LOAD_ROUNDS * num_blocks * block_bytes / seconds / 1e9)
    connector.release(staged)
    connector.close()
    cache.close()


def repeat_call(call: Callable[[], object]) -> None:
    for _ in range(LOAD_ROUNDS):
        call()


def loading(gpus: Sequence[int | None], folder: Any) -> dict[str, Any]:
    """GB/s of each device alone and of all at once; the link alone is the measure."""
    num_blocks = 8 if gpus[0] is None else 128
    num_bytes = 32 * len(gpus) * num_blocks * namespace(SIZE).layout.block_bytes
    host = host_config(folder, num_bytes).model_copy(
        update={"name": "loads", "populate": True, "reserve_ahead": num_blocks}
    )
    context = multiprocessing.get_context("spawn")
    with owned(host):
        ends, processes = [], []
        for gpu in gpus:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=load_process, args=(host, gpu, num_blocks, theirs), daemon=True
            )
            process.start()
            ends.append(ours)
            processes.append(process)
        for end in ends:
            if not end.poll(WAIT_S) or end.recv() != "ready":
                raise SystemExit("a loading process does not answer")

        def ask(what: str, asked: Sequence[Connection]) -> list[float]:
            for end in asked:
                end.send(what)
            return [float(end.recv()) for end in asked]

        ask("load", ends)
        links = [statistics.median([ask("link", [end])[0] for _ in range(3)]) for end in ends]
        alone = [statistics.median([ask("load", [end])[0] for _ in range(3)]) for end in ends]
        together = [ask("load", ends) for _ in range(3)]
        for end, process in zip(ends, processes, strict=True):
            end.send(None)
            process.join(30)
    total = statistics.median(map(sum, together))
    return {
        "link_gb_s": links,
        "load_alone_gb_s": alone,
        "load_together_gb_s": total,
        "of_sum_of_links": total / sum(links),
    }


def measure(options: Any) -> dict[str, Any]:
    wanted, gpus = shape(), num_gpus()
    is_dry = wanted == TINY
    devices: list[int | None] = [None] * gpus if is_dry else list(range(gpus))
    lengths = options.lengths or ([128, 256] if is_dry else [8192, 16384])
    longest = max(max(lengths), options.document + 128)
    pool_tokens = max(longest + 1024, options.clients * (options.document + 256))
    engine = engine_config(wanted, pool_tokens, max_batch_size=max(8, options.clients))
    with scratch() as folder, shared_folder() as arenas:
        found: dict[str, Any] = {"loads": loading(devices, arenas)}
        print(found["loads"], flush=True)
        source = write_model(folder, wanted)
        host = host_config(arenas, (1 << 28) if is_dry else 24 * GIB).model_copy(
            update={"name": "replicas", "populate": True, "reserve_ahead": None}
        )
        cache = CacheConfig(host=host, cost=CostConfig(gate=False))
        with owned(host):
            places = [devices[0], *devices]
            replicas = [
                ReplicaProcess(replica_config(f"replica-{i}", source, engine, cache), gpu)
                for i, gpu in enumerate(places)
            ]
            try:
                for replica in replicas:
                    replica.wait()
                warm_up(replicas, longest)
                before = host_bytes(replicas)
                found["ttft_ms"] = hits(replicas, lengths, options.rounds)
                found |= memory_per_token(before, host_bytes(replicas), lengths, options.rounds)
                one, each = replicas[:1], [replicas[0], *replicas[2:]]
                throughput(each, options, 500)
                found["one_replica"] = throughput(one, options, 1000)
                found["one_on_each"] = throughput(each, options, 2000)
            finally:
                for replica in replicas:
                    replica.close()
    found["requests_ratio"] = (
        found["one_on_each"]["requests_per_s"] / found["one_replica"]["requests_per_s"]
    )
    return {**found, "gpus": 0 if is_dry else gpus, "rounds": options.rounds}


def host_bytes(replicas: Sequence[ReplicaProcess]) -> list[int]:
    """Bytes of host memory that blocks take now, as each replica sees it."""
    hosts = [replica.cache_stats().host for replica in replicas]
    if any(host.evicted_blocks for host in hosts):
        raise SystemExit("blocks were evicted: the arena is too small to tell what a token takes")
    return [host.used_slots * host.block_bytes for host in hosts]


def memory_per_token(
    before: Sequence[int], after: Sequence[int], lengths: Sequence[int], rounds: int
) -> dict[str, Any]:
    """What each cached token took, after every prompt was loaded by all replicas.

    All map one arena: where they see the same bytes, these are one copy.
    """
    num_tokens = rounds * sum(length // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK for length in lengths)
    grown = [new - old for old, new in zip(before, after, strict=True)]
    if len(set(grown)) > 1:
        raise SystemExit(f"the replicas do not see the same memory: {grown}")
    return {"host_bytes_per_cached_token": grown[0] / num_tokens, "cached_tokens": num_tokens}


def warm_up(replicas: Sequence[ReplicaProcess], longest: int) -> None:
    for index, replica in enumerate(replicas):
        prompt = random_prompt(longest, 7 + index, shape())
        replica.ask(prompt, 4)
        replica.flush()
        for other in replicas:
            other.ask(prompt, 4)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--document", type=int, default=4096, help="tokens of a shared document")
    parser.add_argument("--clients", type=int, default=8, help="clients of each replica")
    parser.add_argument("--requests", type=int, default=96, help="requests to each replica")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    options = parser.parse_args()
    found = measure(options)
    print({name: found[name] for name in ("one_replica", "one_on_each", "requests_ratio")})
    report(found, options.json)


if __name__ == "__main__":
    main()
