"""The classes that TensorRT-LLM's configuration names, on a TensorRT-LLM made from our table.

They are found, constructed and called as TensorRT-LLM does it. What its own code does besides was
read, never run.
"""

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shared_cache.connector import process
from shared_cache.connector.interface import RequestData, SchedulerOutput
from shared_cache.connector.trtllm_config import ConnectorConfig
from shared_cache.errors import ConfigError
from shared_cache.host import sizing
from shared_cache.sharded import ShardedCache
from tests.shared_cache.arenas import host_config, memory_folder, running_owner
from tests.shared_cache.fakes import WAIT_S
from tests.shared_cache.trtllm_doubles import (
    TABLE,
    VERSIONS,
    NewArgs,
    OldArgs,
    make_args,
    write_package,
)
from tests.shared_cache.trtllm_sides import (
    ADAPTERS,
    SIZE,
    Connector,
    Request,
    configure,
    construct,
    model,
)
from tests.shared_cache.trtllm_sides import installed as installed

POOL_SHAPE = (16, 3, 2, 2 * SIZE * 16)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMMONS_CACHE_DIR", str(tmp_path / "user"))
    configure(tmp_path, monkeypatch, "host: {scope: process, bytes: 4MiB}")


@pytest.mark.parametrize("release", TABLE)
def test_both_sides_are_upstream_s_and_have_one_cache(
    release: str, installed: Callable[..., ModuleType], tmp_path: Path
) -> None:
    adapters = installed(release)
    base = sys.modules[TABLE[release]["module"]]
    kind = OldArgs if release == "1.2" else NewArgs
    args = make_args(kind, model=model(tmp_path), tokens_per_block=SIZE)
    scheduler, worker = construct(adapters, args)
    assert isinstance(scheduler, base.KvCacheConnectorScheduler)
    assert isinstance(worker, base.KvCacheConnectorWorker)
    assert scheduler._llm_args is worker._llm_args is args
    assert worker.register_forward_pass_callable() is None
    assert scheduler._cache is worker._cache is process.current_cache()
    assert len(process._opened) == 1
    (opened,) = process._opened.values()
    assert opened.num_holders == 2
    engine = opened.joined.facts.namespace.engine
    assert VERSIONS[release].startswith(engine.removeprefix("tensorrt_llm-"))
    worker.register_kv_caches(torch.zeros(POOL_SHAPE, dtype=torch.bfloat16))
    worker.close()


def run_prompt(connector: Connector, pool: torch.Tensor, request: Request) -> int:
    """One request through one turn, as the executor does it; the tokens that were matched."""
    scheduler, worker = connector
    tokens = request.get_tokens(0)
    blocks = list(range(-(-len(tokens) // SIZE)))
    matched, is_async = scheduler.get_num_new_matched_tokens(request, 0)
    assert not is_async
    scheduler.update_state_after_alloc(request, blocks)
    report = RequestData(request.request_id, tokens, blocks, 0, len(tokens) - matched)
    metadata = scheduler.build_connector_meta(SchedulerOutput([report], []))
    worker.bind_connector_meta(pickle.loads(pickle.dumps(metadata)))
    worker.start_load_kv(None)
    for block in range(matched // SIZE, len(tokens) // SIZE):
        pool[block] = block + 1.0
    worker.wait_for_save(None)
    assert scheduler.request_finished(request, blocks) is False
    return int(matched)


@pytest.mark.parametrize("release", ["1.2", "1.3"])
def test_a_second_engine_loads_what_the_first_one_computed(
    release: str, installed: Callable[..., ModuleType], tmp_path: Path
) -> None:
    args = make_args(OldArgs, model=model(tmp_path), tokens_per_block=SIZE)
    tokens = list(range(5 * SIZE))
    for turn, expected in enumerate((0, 4 * SIZE)):  # the last block is left to compute
        connector = construct(installed(release), args)
        pool = torch.zeros(POOL_SHAPE, dtype=torch.bfloat16)
        connector[1].register_kv_caches(pool)
        assert run_prompt(connector, pool, Request(turn, tokens)) == expected
        assert [float(pool[block].unique()) for block in range(5)] == [1, 2, 3, 4, 5]
        connector[1].close()
        process.leave_current(WAIT_S)  # flushes to the store; host memory goes with the process
        assert process.current_cache() is None


def test_a_pool_with_other_blocks_is_refused(
    installed: Callable[..., ModuleType], tmp_path: Path
) -> None:
    args = make_args(OldArgs, model=model(tmp_path), tokens_per_block=SIZE)
    _, worker = construct(installed("1.2"), args)
    with pytest.raises(ConfigError, match="holds 64 tokens"):
        worker.register_kv_caches(torch.zeros((4, 3, 2, 2 * 64 * 16), dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="elements are float16"):
        worker.register_kv_caches(torch.zeros(POOL_SHAPE, dtype=torch.float16))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bits8", "uint8"])
def test_an_fp8_pool_is_taken_under_each_of_its_names(
    dtype: str, installed: Callable[..., ModuleType], tmp_path: Path
) -> None:
    args = make_args(OldArgs, model=model(tmp_path), tokens_per_block=SIZE)
    args.kv_cache_config.dtype = "fp8"
    connector = construct(installed("1.2"), args)
    pool = torch.zeros(POOL_SHAPE, dtype=torch.uint8)
    connector[1].register_kv_caches(pool.view(getattr(torch, dtype)))
    assert run_prompt(connector, pool, Request(1, list(range(5 * SIZE)))) == 0
    connector[1].close()
    cache = process.current_cache()
    assert cache is not None
    assert cache.flush(WAIT_S)
    assert connector[0].get_num_new_matched_tokens(Request(2, list(range(5 * SIZE))), 0)[0]


def test_what_must_be_refused_is_refused_by_both_constructors(
    installed: Callable[..., ModuleType], tmp_path: Path
) -> None:
    adapters = installed("1.2")
    args = make_args(OldArgs, model=model(tmp_path), host_cache_size=1 << 30)
    for kind in (adapters.SharedCacheScheduler, adapters.SharedCacheWorker):
        with pytest.raises(ConfigError, match="host_cache_size"):
            kind(args)
    assert process.current_cache() is None


def test_an_error_of_the_cache_names_the_file(
    installed: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").write_text("in the way")
    adapters = installed("1.2")
    args = make_args(OldArgs, model=model(tmp_path), tokens_per_block=SIZE)
    named = r"cache\.yaml \(where `cache\.` is left out\): the store needs a folder"
    with pytest.raises(ConfigError, match=named):
        adapters.SharedCacheWorker(args)


def test_a_missing_dependency_of_the_new_module_is_not_taken_for_an_old_version(
    installed: Callable[..., ModuleType], tmp_path: Path
) -> None:
    root = tmp_path / "site-1.3-0"
    write_package(root, "1.3")
    module = root.joinpath(*TABLE["1.3"]["module"].split(".")).with_suffix(".py")
    module.write_text("import a_module_that_nobody_has\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        installed("1.3")


def test_without_tensorrt_llm_the_import_says_so() -> None:
    script = f"import sys; sys.modules['tensorrt_llm'] = None; import {ADAPTERS}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert "tensorrt_llm" in done.stderr.splitlines()[-1]


def test_rank_0_opens_every_shard_and_the_others_their_own(
    installed: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_folder() as folder, running_owner(host_config(folder, bytes=16 << 20)):
        host = f"{{folder: {folder}, bytes: 16MiB, start_owner: false}}"
        configure(tmp_path, monkeypatch, f"host: {host}")
        common = {"model": model(tmp_path), "tokens_per_block": SIZE, "tensor_parallel_size": 2}
        adapters = installed("1.2")
        scheduler, leader = construct(adapters, make_args(OldArgs, rank=0, **common))
        follower = adapters.SharedCacheWorker(make_args(OldArgs, rank=1, **common))
        first, second = (opened.joined for opened in process._opened.values())
        assert isinstance(first.cache, ShardedCache)
        assert scheduler._cache is first.cache
        assert leader._cache is first.shard
        assert follower._cache is second.shard is second.cache
        assert (leader._rank, follower._rank) == (0, 1)
        assert second.facts.namespace == first.facts.namespace, "one set of names for both"
        assert first.facts.layout.num_kv_heads == 1
        while process.current_cache() is not None:
            process.leave_current(0.0)


def test_another_configuration_is_another_cache_and_both_end_on_their_own(
    installed: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = installed("1.2")
    args = make_args(OldArgs, model=model(tmp_path), tokens_per_block=SIZE)
    runtime = adapters._runtime()
    first = process.join(args, runtime)
    again = process.join(args, runtime)
    assert again is first
    configure(tmp_path, monkeypatch, "host: {scope: process, bytes: 2MiB}")
    second = process.join(args, adapters._runtime())
    assert process.current_cache() is second.cache is not first.cache
    process.leave(second, 0.0)
    assert process.current_cache() is first.cache
    process.leave(first, 0.0)
    assert process.current_cache() is first.cache, "one holder is left"
    process.leave(again, 0.0)
    assert process.current_cache() is None
    process.leave_current(0.0)
    process.leave(first, 0.0)


def test_sizes_that_nobody_names_follow_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr(sizing, "_folder_bytes", lambda config: 1 << 60)
    found = process.sized(ConnectorConfig(store="file:///x"))
    assert (found.host.bytes, found.save_queue_bytes) == (16 << 30, 4 << 30)
    named = ConnectorConfig(host={"bytes": "8GiB"}, save_queue_bytes="1GiB")
    assert process.sized(named) == named


def test_joining_tells_what_a_user_has_to_know(
    installed: Callable[..., ModuleType], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = installed("1.2")
    settings = {"tokens_per_block": SIZE, "enable_partial_reuse": True}
    settings["copy_on_partial_reuse"] = False
    with caplog.at_level(logging.INFO):
        adapters.SharedCacheWorker(make_args(OldArgs, model=model(tmp_path), **settings))
    assert "enable_partial_reuse" in caplog.text
    assert "shared cache of rank 0 of 1" in caplog.text
    assert f"file://{tmp_path}/store" in caplog.text


SCRIPT = """
import sys
from pathlib import Path
from shared_cache.connector import process
from shared_cache.hashing import BlockHashChain
from tests.shared_cache.trtllm_doubles import OldArgs, make_args
import shared_cache.connector.tensorrt_llm as adapters
joined = process.join(
    make_args(OldArgs, model=sys.argv[1], tokens_per_block=8), adapters._runtime()
)
chain = BlockHashChain(8, tokens=range(800))
slots = joined.shard.reserve(100)
from shared_cache.host.interface import NewRun
joined.shard.save(slots, NewRun(chain.parent_of(0), tuple(chain.hashes)), 0)
"""


def test_saves_that_are_under_way_outlive_the_process(tmp_path: Path) -> None:
    write_package(tmp_path / "site", "1.2")
    script = [sys.executable, "-c", SCRIPT, str(model(tmp_path))]
    config = tmp_path / "cache.yaml"
    environment = {
        "PYTHONPATH": f"{tmp_path}/site:{Path(__file__).parents[2]}",
        "TLLM_SHARED_CACHE_CONFIG": str(config),
        "KVCOMMONS_CACHE_DIR": str(tmp_path / "user"),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "[kvcommons] [INFO] shared cache of rank 0 of 1" in done.stderr
    stored = [file for file in (tmp_path / "store").rglob("*") if file.stat().st_size > 100_000]
    assert sum(file.stat().st_size for file in stored) >= 100 * 3 * 2 * 2 * SIZE * 16 * 2
