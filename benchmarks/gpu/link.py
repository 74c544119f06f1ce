"""Loads and saves of the real connector worker against what the link between host and GPU gives.

The link: the same blocks, page-aligned pinned memory to scattered pool rows and back, one
asynchronous copy each. Ours: the node-shared arena with its owner's process, `SharedCacheWorker`
with its plans, `SharedCache` with its leases, reservations and checksums. Without a GPU the same
script copies with the CPU, which shows that it runs and nothing else.

    python -m benchmarks.gpu.link --json FILE
"""

import argparse
import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.arena import host_config, namespace, owned, shared_folder
from benchmarks.cases.rounds import new_names
from benchmarks.provenance import provenance
from cluster.demo.report import write_json
from shared_cache.config import CacheConfig
from shared_cache.connector.transfers import Load, SaveRun, TransferPlan, pack_loads
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.opening import open_cache
from shared_cache.staging import SharedCache

SIZE = "4MiB"
ROOT_HASH = ReuseScope().root_hash()
FLUSH_S = 60.0


class Link:
    """Pinned host memory and pool rows, copied one block at a time without waiting in between."""

    def __init__(self, pool: torch.Tensor, rows: Sequence[int]) -> None:
        num_bytes = len(rows) * pool.shape[1]
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pool.is_cuda)
        parts = self._host.view(len(rows), -1)
        self._pairs = [(part, pool[row]) for part, row in zip(parts, rows, strict=True)]

    def load(self) -> None:
        for host, row in self._pairs:
            row.copy_(host, non_blocking=True)

    def save(self) -> None:
        for host, row in self._pairs:
            host.copy_(row, non_blocking=True)


class Connector:
    """The worker over the node-shared arena, as an engine's step drives it."""

    def __init__(self, cache: SharedCache, pool: torch.Tensor, rows: Sequence[int]) -> None:
        self._cache = cache
        self._rows = rows
        self._num_saves = 0
        self._worker = SharedCacheWorker(cache)
        self._worker.register_kv_caches(pool)
        self._stream = torch.cuda.current_stream() if pool.is_cuda else None

    def prepare_save(self) -> Sequence[BlockHash]:
        """A plan that saves all rows under names that nobody has; and slots to save them into."""
        self._num_saves += 1
        hashes = new_names(f"save {self._num_saves}", len(self._rows))
        packed = array("I", self._rows).tobytes()
        run = SaveRun(ROOT_HASH, b"".join(hashes), packed)
        self._worker.bind_connector_meta(TransferPlan(saves=(run,)))
        self._await_stock()
        return hashes

    def save(self) -> None:
        self._worker.wait_for_save(self._stream)

    def prepare_load(self, hashes: Sequence[BlockHash]) -> Any:
        """Stage the blocks and plan to load them; the lease, to release afterwards."""
        if not self._cache.flush(FLUSH_S):
            raise SystemExit("saves were not published in time")
        staged = self._cache.stage(hashes)
        if staged.num_blocks != len(hashes):
            raise SystemExit(f"{staged.num_blocks} of {len(hashes)} blocks are here")
        loads = pack_loads([Load(self._cache.places(staged), self._rows)])
        self._worker.bind_connector_meta(TransferPlan(loads))
        return staged

    def load(self) -> None:
        self._worker.start_load_kv(self._stream)

    def release(self, staged: Any) -> None:
        self._cache.release(staged)

    def close(self) -> None:
        self._worker.close()

    def _await_stock(self) -> None:
        """Wait until as many slots are reserved ahead as one turn takes."""
        deadline_s = time.monotonic() + FLUSH_S
        while time.monotonic() < deadline_s:
            if self._cache.host.stats().reserved_slots >= len(self._rows):
                return
            time.sleep(0.005)
        raise SystemExit("the owner gave too few slots")


def timed(call: Callable[[], object], finish: Callable[[], object]) -> float:
    """Seconds until everything that `call` began is done; the GPU is idle before."""
    finish()
    start_s = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start_s


def measure(num_blocks: int, num_rounds: int, device: str) -> dict[str, Any]:
    """Medians of interleaved rounds, in GB/s and as ratios; checks the loaded bytes."""
    space = namespace(SIZE)
    block_bytes = space.layout.block_bytes
    pool = torch.randint(255, (2 * num_blocks, block_bytes), dtype=torch.uint8, device=device)
    rows = torch.randperm(2 * num_blocks)[:num_blocks].tolist()
    finish = torch.cuda.synchronize if pool.is_cuda else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    with shared_folder() as folder:
        # Each round saves new blocks; room for some rounds, then the oldest are evicted.
        host = host_config(folder, 9 * num_blocks * block_bytes)
        host = host.model_copy(update={"reserve_ahead": num_blocks})
        with owned(host):
            cache = open_cache(CacheConfig(host=host), space)
            link, connector = Link(pool, rows), Connector(cache, pool, rows)
            for index in range(num_rounds + 1):
                found = _round(link, connector, pool, rows, finish)
                if index:  # the first one warms up
                    for name, value in found.items():
                        seconds[name].append(value)
            connector.close()
            cache.close()
    num_bytes = num_blocks * block_bytes
    speeds = {name: num_bytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
    return {
        "gb_per_s": speeds,
        "load_vs_link": speeds["load"] / speeds["link_load"],
        "save_vs_link": speeds["save"] / speeds["link_save"],
    }


NAMES = ("link_save", "save", "link_load", "load")


def _round(
    link: Link,
    connector: Connector,
    pool: torch.Tensor,
    rows: Sequence[int],
    finish: Callable[[], object],
) -> dict[str, float]:
    found = {"link_save": timed(link.save, finish)}
    hashes = connector.prepare_save()
    found["save"] = timed(connector.save, finish)
    expected = pool[rows].clone()
    staged = connector.prepare_load(hashes)
    found["link_load"] = timed(link.load, finish)
    pool[rows] = 0
    found["load"] = timed(connector.load, finish)
    if not torch.equal(pool[rows], expected):
        raise SystemExit("the loaded blocks are not those that were saved")
    connector.release(staged)
    return found


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--blocks", type=int, default=128, help="blocks of 4 MiB (default: 128)")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(options.blocks, options.rounds, device)
    for name, speed in found["gb_per_s"].items():
        print(f"{name:10} {speed:7.2f} GB/s")
    print(f"load {found['load_vs_link']:.3f} of the link, save {found['save_vs_link']:.3f}")
    if options.json:
        report = {
            **found,
            "blocks": options.blocks,
            "rounds": options.rounds,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (dry run)",
            **provenance(),
        }
        write_json(report, options.json)


if __name__ == "__main__":
    main()
