"""What an engine had is given back when it ends: pool, pinned memory, thread; and not too early.

TensorRT-LLM tells a connector of nothing. So the end of the cache closes the worker, and a worker
that nobody holds any more ends by itself. CUDA is a double here, with copies that end when told.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from shared_cache.config import CacheConfig
from shared_cache.connector import process, worker
from shared_cache.connector.cuda_copier import CudaCopier
from shared_cache.connector.pinned import PinnedMemory
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.host.local import LocalHostTier
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import WAIT_S
from tests.shared_cache.test_trtllm_adapters import POOL_SHAPE, run_prompt
from tests.shared_cache.trtllm_doubles import OldArgs, make_args
from tests.shared_cache.trtllm_sides import SIZE, Request, configure, construct, model
from tests.shared_cache.trtllm_sides import installed as installed

ENDINGS = [lambda: process.leave_current(WAIT_S), process._close_all]


class FakeCuda:
    """Streams without order, and events that are reached while `is_free` is set."""

    def __init__(self) -> None:
        self.is_free = threading.Event()
        self.is_free.set()
        self.pinned: list[int] = []

    def event(self, **_: object) -> Any:
        return SimpleNamespace(
            record=lambda stream: None,
            synchronize=lambda: self.is_free.wait(WAIT_S),
            elapsed_time=lambda end: 1.0,
        )

    def stream(self, *_: object) -> Any:
        return SimpleNamespace(
            wait_stream=lambda other: None,
            wait_event=lambda event: None,
            synchronize=lambda: None,
        )

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(worker, "make_copier", CudaCopier)
    yield fake
    fake.is_free.set()


@pytest.fixture
def engine(
    cuda: FakeCuda,
    installed: Callable[..., ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], Any]:
    """Makes both sides of a connector, as they are made in an engine's process."""
    monkeypatch.setenv("KVCOMMONS_CACHE_DIR", str(tmp_path / "user"))
    configure(tmp_path, monkeypatch, "host: {scope: process, bytes: 4MiB}\ncost: {gate: false}")
    args = make_args(OldArgs, model=model(tmp_path), tokens_per_block=SIZE)
    return lambda: construct(installed("1.2"), args)


def copied_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "kvcommons-copied"]


def prompt(number: int) -> Request:
    return Request(number, list(range(5 * SIZE)))


def test_a_worker_that_nobody_holds_gives_everything_back(cuda: FakeCuda) -> None:
    """Though the cache lives on: it has no word of the engine's end."""
    pool = torch.zeros((4, 1024), dtype=torch.bfloat16)
    cache = SharedCache(LocalHostTier(16 * 2048, 2048), (), CacheConfig())
    one = SharedCacheWorker(cache)
    one.register_kv_caches(pool)
    assert isinstance(one._copier, CudaCopier)
    view = weakref.ref(one._copier._pool)
    (thread,) = copied_threads()
    assert len(cuda.pinned) == 1
    del one
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert view() is None
    assert cuda.pinned == []
    cache.close()


def test_a_worker_is_given_back_after_its_last_save(
    engine: Callable[[], Any], cuda: FakeCuda
) -> None:
    connector = engine()
    pool = torch.zeros(POOL_SHAPE, dtype=torch.bfloat16)
    connector[1].register_kv_caches(pool)
    view = weakref.ref(connector[1]._copier._pool)
    (thread,) = copied_threads()
    cuda.is_free.clear()
    run_prompt(connector, pool, prompt(1))
    del connector
    gc.collect()
    assert thread.is_alive(), "its copies are under way"
    assert view() is not None, "and read the pool"
    cuda.is_free.set()
    cache = process.current_cache()
    assert cache is not None
    assert cache.flush(WAIT_S)
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert view() is None


@pytest.mark.parametrize("end", ENDINGS)
def test_the_cache_s_end_closes_a_worker_that_is_held(
    engine: Callable[[], Any], cuda: FakeCuda, end: Callable[[], None]
) -> None:
    connector = engine()
    pool = torch.zeros(POOL_SHAPE, dtype=torch.bfloat16)
    connector[1].register_kv_caches(pool)
    view = weakref.ref(connector[1]._copier._pool)
    run_prompt(connector, pool, prompt(1))
    assert cuda.pinned
    end()
    assert view() is None
    assert copied_threads() == []
    assert cuda.pinned == [], "given back before the memory is unmapped"
    connector[1].close()


@pytest.mark.parametrize("end", ENDINGS)
def test_the_end_waits_for_copies_that_are_under_way(
    engine: Callable[[], Any], cuda: FakeCuda, end: Callable[[], None]
) -> None:
    connector = engine()
    pool = torch.zeros(POOL_SHAPE, dtype=torch.bfloat16)
    connector[1].register_kv_caches(pool)
    cuda.is_free.clear()
    assert run_prompt(connector, pool, prompt(1)) == 0
    ending = threading.Thread(target=end)
    ending.start()
    ending.join(0.2)
    assert ending.is_alive(), "four blocks are not in host memory yet"
    cuda.is_free.set()
    ending.join(WAIT_S)
    assert not ending.is_alive()
    scheduler, _ = engine()
    found, _ = scheduler.get_num_new_matched_tokens(prompt(2), 0)
    assert found == 4 * SIZE, "all were stored"


def test_a_part_that_does_not_close_keeps_no_cache_open(
    engine: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def close(self) -> None:
            raise RuntimeError("a broken device")

    _, side = engine()
    (opened,) = process._opened.values()
    broken, closed = Broken(), []
    opened.joined.on_close(broken.close)
    monkeypatch.setattr(opened.joined.shard, "close", lambda: closed.append("cache"))
    side.register_kv_caches(torch.zeros(POOL_SHAPE, dtype=torch.bfloat16))
    process.leave_current(WAIT_S)
    assert closed == ["cache"]
    assert side._copier is None
    assert "a broken device" in caplog.text
    monkeypatch.undo()
    opened.joined.shard.close()


def test_what_is_shown_after_the_end_is_not_pinned(cuda: FakeCuda) -> None:
    """A tier shows memory as it comes into use, perhaps while its engine ends."""
    pinned = PinnedMemory(torch.device("cpu"))
    pinned.pin(memoryview(bytearray(64)))
    assert len(cuda.pinned) == 1
    pinned.release()
    pinned.pin(memoryview(bytearray(64)))
    assert cuda.pinned == []
    pinned.release()
