"""The endpoint on a real HTTP server in this process: two engines, no Ray."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from actors.config import EngineConfig, KvCacheConfig, ReplicaConfig
from actors.dispatch import DispatchConfig, Dispatcher, ReplicaClient
from actors.engine import Engine
from actors.replica import EngineReplica
from actors.router_messages import Route
from actors.router_snapshot import ReplicaSnapshot, RouterSnapshot
from actors.wire.client import WireReplica
from cluster.config import ServeConfig
from cluster.endpoint.access import Access
from cluster.endpoint.api import create_api
from cluster.endpoint.keys import KeysDocument
from cluster.endpoint.prompts import PromptEncoder
from cluster.endpoint.service import Endpoint
from shared_cache.config import CacheConfig
from shared_cache.errors import ReplicaUnavailableError
from tests.tiny_model import make_tiny_model, tiny_source

BLOCK = 8
HOST = {"scope": "process", "bytes": 1 << 22}
NAMES = ("replica-0", "replica-1")


class RoundRobin:
    """A `RouterClient` and the router's view; replicas in `dead` get nothing."""

    def __init__(self) -> None:
        self.dead: set[str] = set()
        self.is_away = False
        self.num_open = 0
        self._turns = itertools.cycle(NAMES)
        self._numbers = itertools.count()

    async def route(self, hashes, num_prompt_tokens, avoid=(), output_tokens=None):
        await asyncio.sleep(0)
        for _ in NAMES:
            name = next(self._turns)
            if name not in self.dead and name not in avoid:
                self.num_open += 1
                return Route(next(self._numbers), name, "boot", first_token_s=0.5)
        return None

    def first_token(self, request_id, receipt, prefill_s=None):
        pass

    def finished(self, request_id, hashes, output_tokens=0):
        self.num_open -= 1

    def mark_dead(self, replica_id, boot_id):
        self.dead.add(replica_id)

    async def snapshot(self) -> RouterSnapshot:
        if self.is_away:
            raise ReplicaUnavailableError("no actor 'router' runs now")
        replicas = tuple(
            ReplicaSnapshot(one, "boot", one not in self.dead, 0, 0, 0, 0) for one in NAMES
        )
        return RouterSnapshot("round_robin", replicas, 0, 0, 0, 0, 0)


class Served:
    """A running endpoint: `url` for clients, the parts behind it for the tests."""

    def __init__(self, endpoint: Endpoint, router: RoundRobin, replicas: Mapping[str, Any]) -> None:
        self.endpoint = endpoint
        self.router = router
        self.replicas = replicas
        self.url = ""
        self.clients: Mapping[str, ReplicaClient] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_outstanding(self) -> int:
        return sum(one._num_outstanding for one in self.replicas.values())

    def flush(self) -> None:
        for one in self.replicas.values():
            assert asyncio.run_coroutine_threadsafe(one.flush(20), self.loop).result(30)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("endpoint") / "model")


@contextmanager
def serving(
    model_path: Any,
    keys: KeysDocument | None = None,
    build: Callable[[ReplicaConfig], Engine] | None = None,
    cache: dict[str, Any] | None = None,
    **serve: Any,
) -> Iterator[Served]:
    """An endpoint on a free port, with two engines of the tiny model or those of `build`."""
    configs = [replica_config(name, model_path, cache) for name in NAMES]
    replicas = {config.name: EngineReplica(config, build) for config in configs}
    with serving_through(model_path, replicas, replicas, keys, **serve) as served:
        yield served


@contextmanager
def serving_through(
    model_path: Any,
    clients: Mapping[str, ReplicaClient],
    replicas: Mapping[str, EngineReplica],
    keys: KeysDocument | None = None,
    **serve: Any,
) -> Iterator[Served]:
    """An endpoint whose replicas are reached through `clients`; `replicas` are closed after it."""
    router = RoundRobin()
    dispatch = DispatchConfig(first_wait_s=0.2, replica_wait_s=0.5, poll_interval_s=0.02)
    endpoint = Endpoint(
        model="tiny",
        config=ServeConfig(**serve),
        encoder=PromptEncoder(str(model_path)),
        dispatcher=Dispatcher(router, clients.__getitem__, BLOCK, dispatch),
        router=router,
        access=Access(keys),
        max_total_tokens=2048,
    )
    served = Served(endpoint, router, replicas)
    served.clients = clients
    with _running(served):
        yield served


def replica_config(
    name: str, model_path: Any, cache: dict[str, Any] | None = None
) -> ReplicaConfig:
    engine = EngineConfig(
        torch_threads=1, kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=2048)
    )
    return ReplicaConfig(
        name=name,
        model=tiny_source(model_path),
        engine=engine,
        cache=None if cache is None else CacheConfig(**cache),
    )


@contextmanager
def _running(served: Served) -> Iterator[None]:
    """uvicorn on a thread of its own, as Serve runs an application on one."""
    app = create_api(served.endpoint)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    is_up = threading.Event()

    async def run() -> None:
        served.loop = asyncio.get_running_loop()
        for one in served.replicas.values():
            await one.ready()
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        served.url = f"http://127.0.0.1:{port}"
        is_up.set()
        await task
        for one in served.clients.values():
            if isinstance(one, WireReplica):
                one.close()
        await asyncio.sleep(0)
        for one in served.replicas.values():
            await one.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert is_up.wait(60)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(model_path, tmp_path_factory) -> Iterator[Served]:
    """One endpoint without keys for all tests that do not change it."""
    store = str(tmp_path_factory.mktemp("store"))
    with serving(model_path, cache={"store": store, "host": HOST}) as one:
        yield one


@pytest.fixture
def http(served) -> Iterator[httpx.Client]:
    with ExitStack() as stack:
        yield stack.enter_context(httpx.Client(base_url=served.url, timeout=60))
