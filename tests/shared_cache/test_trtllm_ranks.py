"""Two ranks in two processes, as MPI starts them: one set of names, two shards, one arena.

Rank 0 answers for both and is in this process. Rank 1 is told by a pickled plan what to copy, finds
the slots that rank 0 has leased for it in the arena, and writes what it saves there itself.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from shared_cache.connector import process
from shared_cache.connector.interface import RequestData, SchedulerOutput
from tests.shared_cache.arenas import host_config, memory_folder, running_owner
from tests.shared_cache.fakes import WAIT_S
from tests.shared_cache.trtllm_doubles import OldArgs, make_args, write_package
from tests.shared_cache.trtllm_sides import SIZE, Request, configure, construct, model
from tests.shared_cache.trtllm_sides import installed as installed

NUM_BLOCKS = 5
POOL_SHAPE = (16, 3, 2, 1 * SIZE * 16)

FOLLOWER = """
import json, pickle, sys
import torch
from shared_cache.connector import process
from tests.shared_cache.fakes import WAIT_S
from tests.shared_cache.test_trtllm_ranks import POOL_SHAPE, turn
from tests.shared_cache.trtllm_doubles import OldArgs, make_args
import shared_cache.connector.tensorrt_llm as adapters

worker = adapters.SharedCacheWorker(make_args(OldArgs, **json.loads(sys.argv[1])))
pool = torch.zeros(POOL_SHAPE, dtype=torch.bfloat16)
worker.register_kv_caches(pool)
print(json.dumps(process.current_cache().host.num_slots), flush=True)
for line in sys.stdin:
    metadata, computed = pickle.loads(bytes.fromhex(line))
    print(json.dumps(turn(worker, pool, metadata, computed, sign=-1)), flush=True)
process.leave_current(WAIT_S)
"""


def turn(worker: Any, pool: torch.Tensor, plan: Any, computed: list[int], sign: int) -> list[float]:
    """One turn of one rank: load, compute these blocks, save; then what the pool's blocks hold."""
    pool.zero_()
    worker.bind_connector_meta(plan)
    worker.start_load_kv(None)
    for block in computed:
        pool[block] = sign * (block + 1.0)
    worker.wait_for_save(None)
    cache = process.current_cache()
    assert cache is not None
    assert cache.flush(WAIT_S)
    return [float(pool[block].unique()) for block in range(NUM_BLOCKS)]


class Follower:
    """Rank 1 in a process of its own."""

    def __init__(self, arguments: dict[str, Any], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, json.dumps(arguments)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self) -> int:
        self._process.communicate(timeout=WAIT_S)
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def follower(tmp_path: Path, common: dict[str, Any]) -> Iterator[Follower]:
    write_package(tmp_path / "site-of-rank-1", "1.2", mpi_rank=1)
    search_path = f"{tmp_path}/site-of-rank-1:{Path(__file__).parents[2]}"
    arguments = {**common, "model": str(common["model"])}  # no rank: MPI's counts
    rank = Follower(arguments, {"PYTHONPATH": search_path})
    try:
        yield rank
    finally:
        rank.kill()


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMMONS_CACHE_DIR", str(tmp_path / "user"))


def test_both_ranks_load_their_own_shards(
    installed: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_folder() as folder, running_owner(host_config(folder, bytes=16 << 20)):
        host = f"host: {{folder: {folder}, bytes: 16MiB, start_owner: false}}"
        configure(tmp_path, monkeypatch, f"{host}\nmatch_wait_s: 10\ncost: {{gate: false}}")
        common = {"model": model(tmp_path), "tokens_per_block": SIZE, "tensor_parallel_size": 2}
        with follower(tmp_path, common) as other:
            scheduler, worker = construct(installed("1.2"), make_args(OldArgs, rank=0, **common))
            pool = torch.zeros(POOL_SHAPE, dtype=torch.bfloat16)
            worker.register_kv_caches(pool)
            assert other.answer() > 0, "rank 1 has opened its shard"
            tokens = list(range(NUM_BLOCKS * SIZE))
            for request_id, expected in ((1, 0), (2, NUM_BLOCKS - 1)):
                request = Request(request_id, tokens)
                blocks = list(range(NUM_BLOCKS))
                matched, _ = scheduler.get_num_new_matched_tokens(request, 0)
                assert matched == expected * SIZE
                scheduler.update_state_after_alloc(request, blocks)
                report = RequestData(request_id, tokens, blocks, 0, len(tokens) - matched)
                plan = scheduler.build_connector_meta(SchedulerOutput([report], []))
                computed = blocks[matched // SIZE :]
                other.tell(pickle.dumps((plan, computed)).hex())
                mine = turn(worker, pool, plan, computed, sign=1)
                assert mine == [1, 2, 3, 4, 5]
                assert other.answer() == [-1, -2, -3, -4, -5]
                scheduler.request_finished(request, blocks)
            worker.close()
            assert other.end() == 0
        while process.current_cache() is not None:
            process.leave_current(0.0)
