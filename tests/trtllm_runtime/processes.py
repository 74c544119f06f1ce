"""Ranks and engines in processes of their own, over one node's arena and a store on disk.

As TensorRT-LLM has them: rank 0 holds the scheduler and opens every rank's shards, another rank
opens its own, and copies slots that rank 0's process has leased. And any of them can be killed.
"""

import multiprocessing as mp
import random
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from shared_cache.config import CacheConfig
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.opening import open_cache
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import WAIT_S, await_published
from tests.trtllm_runtime.pool import Pass, RankPool
from tests.trtllm_runtime.replica import Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import Rules
from tests.trtllm_runtime.site import Site
from tests.trtllm_runtime.stream import DeviceStream

SPAWN = mp.get_context("spawn")
ANSWER_S = 60.0


def open_caches(config: CacheConfig, tp_size: int) -> list[SharedCache]:
    """What rank 0's process opens: every rank's shards."""
    return [open_cache(config, namespace) for namespace in Site(tp_size).namespaces]


class RemoteError(Exception):
    """What another process raised, as text."""


class Child:
    """A process that does what it is told, call by call."""

    def __init__(self, serve: Callable[..., None], *args: object) -> None:
        self._connection, there = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(there, *args), daemon=True)
        self.process.start()
        there.close()

    def ask(self, name: str, *args: Any) -> Any:
        """The answer to one call; `RemoteError` with what it raised there."""
        self._connection.send((name, args))
        return self.answer()

    def tell(self, name: str, *args: Any) -> None:
        """One call whose answer nobody waits for."""
        self._connection.send((name, args))

    def answer(self) -> Any:
        """The next answer."""
        assert self._connection.poll(ANSWER_S), "the process does not answer"
        is_good, answer = self._connection.recv()
        if not is_good:
            raise RemoteError(answer)
        return answer

    def kill(self) -> None:
        """As `kill -9` does it."""
        self.process.kill()
        self.process.join(WAIT_S)
        self._connection.close()

    def close(self) -> None:
        """Let it end by itself."""
        self.tell("close")
        self.process.join(WAIT_S)
        if self.process.exitcode is None:
            self.kill()
        self._connection.close()


def _serve(connection: Connection, calls: dict[str, Callable[..., Any]]) -> None:
    """Answer calls until `close`."""
    while True:
        name, args = connection.recv()
        try:
            answer = (True, calls[name](*args))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        if name == "close":
            return
        connection.send(answer)


class RankProcess(Child):
    """A rank behind rank 0: its worker and its pool, both elsewhere."""

    tensor = None

    def __init__(self, config: CacheConfig, rank: int, tp_size: int) -> None:
        super().__init__(serve_rank, config.model_dump(mode="json"), rank, tp_size)
        self.rank = rank

    def make_pool(self, num_blocks: int) -> "RankProcess":
        """The pool is there, and forward passes are asked of it through this."""
        self.ask("make_pool", num_blocks)
        return self

    def register_kv_caches(self, tensor: None) -> None:
        self.ask("register_kv_caches")

    def bind_connector_meta(self, metadata: object) -> None:
        self.ask("bind_connector_meta", metadata)

    def start_load_kv(self, stream: object) -> None:
        self.ask("start_load_kv")

    def wait_for_layer_load(self, layer: int, stream: object) -> None:
        pass

    def save_kv_layer(self, layer: int, stream: object) -> None:
        pass

    def wait_for_save(self, stream: object) -> None:
        self.ask("wait_for_save")

    def get_finished(self, saving: list[int], loading: list[int]) -> tuple[list[int], list[int]]:
        saved, loaded = self.ask("get_finished", saving, loading)
        return saved, loaded

    def forward(self, part: Pass) -> None:
        self.ask("forward", part)

    def scribble(self, block: int, offset: int) -> None:
        self.ask("scribble", block, offset)

    def settle(self) -> None:
        """Wait until what it saved is in the arena."""
        self.ask("settle")

    @property
    def connector_faults(self) -> int:
        return int(self.ask("connector_faults"))


def serve_rank(connection: Connection, config: dict[str, Any], rank: int, tp_size: int) -> None:
    """A rank's process."""
    cache = open_cache(CacheConfig.model_validate(config), Site(tp_size).namespaces[rank])
    worker, pools, stream = SharedCacheWorker(cache, rank), [], DeviceStream()

    def close() -> None:
        worker.close()
        cache.close()

    _serve(
        connection,
        {
            "make_pool": lambda num_blocks: pools.append(RankPool(num_blocks, rank)),
            "register_kv_caches": lambda: worker.register_kv_caches(pools[0].tensor),
            "bind_connector_meta": worker.bind_connector_meta,
            "start_load_kv": lambda: worker.start_load_kv(stream),
            "wait_for_save": lambda: worker.wait_for_save(stream),
            "get_finished": worker.get_finished,
            "forward": lambda part: pools[0].forward(part),
            "scribble": lambda block, offset: pools[0].scribble(block, offset),
            "settle": lambda: await_published(cache),
            "connector_faults": lambda: worker.connector_faults,
            "close": close,
        },
    )


class EngineProcess(Child):
    """A whole engine of one rank, to be killed."""

    def __init__(self, config: CacheConfig, *, overlap: bool = False) -> None:
        super().__init__(serve_engine, config.model_dump(mode="json"), overlap)

    def run(self, prompt: tuple[int, ...], num_new: int) -> tuple[int, list[int]]:
        """Tokens that were loaded, and the answer."""
        promised, generated = self.ask("run", prompt, num_new)
        return promised, generated


def serve_engine(connection: Connection, config: dict[str, Any], overlap: bool) -> None:
    """An engine's process."""
    settings = CacheConfig.model_validate(config)
    caches = open_caches(settings, 1)
    replica = Replica(Site(), Setup(Rules(overlap=overlap, num_blocks=96)), caches)
    draw, ids = random.Random(1), iter(range(1, 1 << 30))

    def run(prompt: tuple[int, ...], num_new: int) -> tuple[int, list[int]]:
        request = Request(next(ids), prompt, num_new)
        replica.executor.blocks.evict_all()
        replica.run(request)
        replica.settle()
        return request.num_promised_tokens, request.generated

    def churn(prompts: list[tuple[int, ...]]) -> None:
        """Serve these in any order for ever; whoever told it to do so kills it."""
        while True:
            replica.submit(Request(next(ids), draw.choice(prompts), draw.randrange(1, 9)))
            for _ in range(draw.randrange(4)):
                replica.step()
            replica.executor.blocks.evict_all()
            connection.send((True, replica.executor.num_turns))

    _serve(connection, {"run": run, "churn": churn, "close": replica.close})
