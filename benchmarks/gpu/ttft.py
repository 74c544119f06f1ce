"""Time to first token of long prompts: cold, from another replica's saves, from the store.

Four replicas in processes of their own on one device. `first` computes each prompt and saves it;
`second` shares the node's arena with it; `third` and `fourth` have arenas of their own, as on other
machines, and find the prompt in the store alone: in the page cache, and on the disk.

    python -m benchmarks.gpu.ttft --json FILE --store FOLDER
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases.arena import host_config, owned, shared_folder
from benchmarks.gpu.workbench import (
    TINY,
    TOKENS_PER_BLOCK,
    Answer,
    ReplicaProcess,
    arguments,
    engine_config,
    median_ms,
    random_prompt,
    replica_config,
    report,
    scratch,
    shape,
    write_model,
)
from shared_cache.config import CacheConfig, CostConfig, HostConfig, TierConfig

LENGTHS = (2048, 4096, 8192, 16384, 32768)
DRY_LENGTHS = (128, 256)
NUM_ANSWER_TOKENS = 64
GIB = 1 << 30


@dataclass
class Found:
    """Seconds to first token of one length, and how much of the answers is equal."""

    cold: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    shared_page_cache: list[float] = field(default_factory=list)
    shared_cold_disk: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    common_prefix: list[float] = field(default_factory=list)
    common_prefix_device: list[float] = field(default_factory=list)
    same_as_device: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        kinds = ("cold", "device", "host", "shared_page_cache", "shared_cold_disk")
        return {kind: median_ms(getattr(self, kind)) for kind in kinds if getattr(self, kind)}


def cache_config(host: HostConfig, store: Path, *, saves: bool) -> CacheConfig:
    admission = "always" if saves else "never"
    tier = TierConfig(url=store.as_uri(), admission=admission, timeout_s=60.0)
    # The gate would refuse what a quick model computes sooner; here every source is measured.
    return CacheConfig(
        host=host,
        tiers=(tier,),
        cost=CostConfig(gate=False),
        staging_deadline_s=30.0,
        save_queue_bytes=6 * GIB,
    )


def check(answer: Answer, tier: str) -> Answer:
    """Fail when the prompt did not come from where it is said to."""
    receipt = answer.receipt
    least = (receipt.prompt_tokens - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
    got = 0 if tier == "cold" else getattr(receipt, tier)
    if (tier == "cold" and receipt.cached) or (tier != "cold" and got != least):
        raise SystemExit(f"expected {least} tokens from {tier}, the receipt says {receipt}")
    return answer


def common_prefix(first: Sequence[int], second: Sequence[int]) -> float:
    pairs = list(zip(first, second, strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return equal / len(pairs)


def forget_pages(folder: Path) -> None:
    """Write the store's files out and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def measure_length(
    replicas: Sequence[ReplicaProcess], num_tokens: int, rounds: int, store: Path
) -> Found:
    first, second, third, fourth = replicas
    found = Found()
    for index in range(rounds):
        prompt = random_prompt(num_tokens, 100 * num_tokens + index, shape())
        cold = check(first.ask(prompt, NUM_ANSWER_TOKENS), "cold")
        found.cold.append(cold.first_s)
        # What rounding alone does: the same blocks, still on the device, and the same tail.
        again = check(first.ask(prompt, NUM_ANSWER_TOKENS), "device")
        found.device.append(again.first_s)
        found.common_prefix_device.append(common_prefix(cold.tokens, again.tokens))
        first.flush()
        host = check(second.ask(prompt, NUM_ANSWER_TOKENS), "host")
        found.host.append(host.first_s)
        found.common_prefix.append(common_prefix(cold.tokens, host.tokens))
        found.same_as_device.append(common_prefix(again.tokens, host.tokens))
        shared = check(third.ask(prompt), "shared")
        found.shared_page_cache.append(shared.first_s)
        forget_pages(store)
        found.shared_cold_disk.append(check(fourth.ask(prompt), "shared").first_s)
        print(num_tokens, index, cold.first_s, host.first_s, shared.first_s, flush=True)
    return found


def measure(options: Any, lengths: Sequence[int]) -> dict[str, Any]:
    wanted = shape()
    arena_bytes = (1 << 28) if wanted == TINY else options.arena_gib * GIB
    pool_tokens = max(lengths) + 1024
    engine = engine_config(wanted, pool_tokens, max_batch_size=8)
    with scratch() as folder, scratch(options.store) as store, shared_folder() as arenas:
        source = write_model(folder, wanted)
        # Those that only read have room for one long prompt at a time, as it is read once.
        sizes = (("one", arena_bytes), ("two", arena_bytes // 2), ("three", arena_bytes // 2))
        hosts = [
            host_config(arenas, num_bytes).model_copy(
                update={"name": name, "reserve_ahead": None, "populate": True}
            )
            for name, num_bytes in sizes
        ]
        with owned(hosts[0], "always"), owned(hosts[1]), owned(hosts[2]):
            configs = [
                replica_config(
                    name, source, engine, cache_config(hosts[arena], store, saves=arena == 0)
                )
                for name, arena in (("first", 0), ("second", 0), ("third", 1), ("fourth", 2))
            ]
            replicas = [ReplicaProcess(config) for config in configs]
            try:
                for replica in replicas:
                    replica.wait()
                warm_up(replicas, lengths)
                found = {n: measure_length(replicas, n, options.rounds, store) for n in lengths}
                dropped = replicas[0].cache_stats().dropped_saves
            finally:
                for replica in replicas:
                    replica.close()
    return {
        "ttft_ms": {str(n): one.medians() for n, one in found.items()},
        "all_ttft_s": {str(n): vars(one) for n, one in found.items()},
        "common_prefix_min": min(min(one.common_prefix) for one in found.values()),
        "common_prefix_device_min": min(min(one.common_prefix_device) for one in found.values()),
        "same_as_device_min": min(min(one.same_as_device) for one in found.values()),
        "dropped_saves": dropped,
        "rounds": options.rounds,
    }


def warm_up(replicas: Sequence[ReplicaProcess], lengths: Sequence[int]) -> None:
    """Each replica computes one prompt, and the others load it: kernels, pages, pinned memory."""
    for index, replica in enumerate(replicas):
        prompt = random_prompt(min(4096, max(lengths)), 7 + index, shape())
        replica.ask(prompt, 4)
        replica.flush()
        for other in replicas:
            other.ask(prompt, 4)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--store", type=Path, help="folder for the store (default: temporary)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arena-gib", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs="+")
    options = parser.parse_args()
    lengths = options.lengths or (DRY_LENGTHS if shape() == TINY else LENGTHS)
    found = measure(options, lengths)
    for length, medians in found["ttft_ms"].items():
        print(f"{length:>6}", medians)
    names = ("common_prefix_min", "common_prefix_device_min", "same_as_device_min", "dropped_saves")
    print({name: found[name] for name in names})
    report(found, options.json)


if __name__ == "__main__":
    main()
