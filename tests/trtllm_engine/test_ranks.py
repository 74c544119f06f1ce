"""With several ranks the connector runs in MPI's processes, and the replica stages for them all.

The ranks are played here by the real connector classes over pools of the runtime's double.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.config import KvCacheConfig
from actors.engines.trtllm import sharing
from shared_cache.config import CacheConfig
from shared_cache.connector import process
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.trtllm_facts import Runtime
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.hashing import block_hashes
from shared_cache.sharded import ShardedCache
from tests.shared_cache.arenas import host_config, memory_folder, running_owner
from tests.shared_cache.fakes import WAIT_S, await_published
from tests.shared_cache.trtllm_doubles import OldArgs, make_args
from tests.trtllm_engine.conftest import replica_config
from tests.trtllm_engine.connected import MODEL
from tests.trtllm_runtime.executor import Executor
from tests.trtllm_runtime.oracle import LAYOUT, block_bytes
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import Rules

SIZE = LAYOUT.tokens_per_block
PROMPT = tuple(range(100, 100 + 6 * SIZE + 1))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.setenv("TLLM_SHARED_CACHE_CONFIG", "")
    with memory_folder() as folder, running_owner(host_config(folder, bytes=16 << 20)):
        yield {"folder": str(folder), "bytes": 16 << 20, "start_owner": False}
        while process.current_cache() is not None:
            process.leave_current(0.0)


def test_what_the_replica_stages_all_ranks_load(tmp_path: Path, host: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    cache = CacheConfig.model_validate(
        {"store": f"file://{tmp_path}/store", "host": host, "cost": {"gate": False}}
    )
    kv = KvCacheConfig(tokens_per_block=SIZE)
    config = replica_config(folder, cache, kv_cache_config=kv, tensor_parallel_size=2)
    sharing.write_connector_config(config, tmp_path / "connector.yaml")
    common = {"model": folder, "tokens_per_block": SIZE, "tensor_parallel_size": 2}
    part = sharing.join_cache(config, "1.2.1", make_args(OldArgs, **common))
    assert isinstance(part.cache, ShardedCache)
    assert (part.namespace.tp_rank, part.namespace.tp_size) == (0, 2)
    assert part.matches is None
    joined = [
        process.join(make_args(OldArgs, rank=rank, **common), Runtime("1.2.1", rank, os.environ))
        for rank in (0, 1)
    ]
    assert joined[0].facts.namespace == part.namespace
    rule = joined[0].rule
    assert (rule.staged_ahead, rule.wait_s) == (False, 0.0)
    scheduler = SharedCacheScheduler(joined[0].cache, SIZE, rule)
    workers = [SharedCacheWorker(one.shard, rank) for rank, one in enumerate(joined)]
    executor = Executor(scheduler, workers, Rules())
    request = Request(1, PROMPT, max_new_tokens=2)
    executor.submit(request)
    executor.run()
    for one in joined:
        await_published(one.shard)
    hashes = block_hashes(PROMPT[:-1], SIZE)
    staged = part.cache.stage(hashes, WAIT_S)
    assert staged.num_blocks == 6
    for rank, shard in enumerate(staged.shards):
        held = joined[rank].shard.lease(hashes)
        for index, slot in enumerate(held.lease.slots):
            data = bytes(joined[rank].shard.host.buffer(slot))
            assert data == block_bytes(request.trail, index, rank)
        joined[rank].shard.release(held)
        assert len(shard.lease.slots) == 6
    again = Executor(
        SharedCacheScheduler(joined[0].cache, SIZE, rule),
        [SharedCacheWorker(one.shard, rank) for rank, one in enumerate(joined)],
        Rules(),
    )
    second = Request(2, PROMPT, max_new_tokens=2)
    again.submit(second)
    again.run()
    assert second.num_promised_tokens == 6 * SIZE
    assert second.tokens == request.tokens
    part.cache.release(staged)
    for worker in (*workers, *(rank.worker for rank in again.manager.ranks)):
        worker.close()
    part.leave()


def test_the_owner_s_settings_are_those_of_the_cluster(tmp_path: Path) -> None:
    """Ranks and replica meet in the arena that the cluster's owner keeps, under its name."""
    cache = CacheConfig.model_validate({"host": {"name": "ours", "start_owner": False}})
    config = replica_config(tmp_path, cache, tensor_parallel_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLLM_SHARED_CACHE_CONFIG", "")
        sharing.write_connector_config(config, tmp_path / "c.yaml")
    written = (tmp_path / "c.yaml").read_text()
    assert "name: ours" in written
    assert "start_owner: false" in written
