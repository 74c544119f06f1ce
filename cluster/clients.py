"""Router and replicas as a dispatcher wants them, reached by name through Ray.

A handle stays bound to the actor it was made for, so it is looked up again by name after every
failure; and Ray's errors become ours, so that a caller needs to know only `shared_cache.errors`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NoReturn, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from actors.dispatch import Dispatcher
from actors.engine import Engine
from actors.metrics import Metrics
from actors.request_log import RequestLog
from actors.router_client import BatchingRouterClient
from actors.router_messages import Batch, Reply
from actors.router_snapshot import RouterSnapshot
from actors.wire.client import WireReplica
from actors.wire.server import Address
from cluster.config import ClusterConfig
from shared_cache.errors import KvcommonsError, ReplicaUnavailableError

T = TypeVar("T")

RAY_NAMESPACE = "kvcommons"

ADDRESS_TIMEOUT_S = 10.0


def raise_as_ours(error: RayError, who: str) -> NoReturn:
    """Raise what the actor raised; `ReplicaUnavailableError` when Ray lost the actor."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, KvcommonsError):
            raise error.cause from error
        raise error
    first_line = str(error).strip().partition("\n")[0]
    raise ReplicaUnavailableError(f"{who} is away: {first_line}") from error


class NamedActor:
    """A named actor's handle, looked up when first used and after each failure."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._handle: Any = None

    def handle(self) -> Any:
        """The handle; raises `ReplicaUnavailableError` when there is no such actor now."""
        if not ray.is_initialized():  # asked, Ray would start a new one
            raise ReplicaUnavailableError(f"{self.name} is away: this process has left Ray")
        if self._handle is None:
            try:
                self._handle = ray.get_actor(self.name, namespace=RAY_NAMESPACE)
            except ValueError as error:
                raise ReplicaUnavailableError(f"no actor {self.name!r} runs now") from error
        return self._handle

    def failed(self, error: RayError) -> NoReturn:
        """Raise the error as one of ours, and look the actor up again next time."""
        if not isinstance(error, RayTaskError):
            self._handle = None
        raise_as_ours(error, self.name)


class RayRouterClient:
    """The router actor of that name."""

    def __init__(self, name: str) -> None:
        self._actor = NamedActor(name)

    def send(self, batch: Batch) -> Awaitable[Reply]:
        """See `Router.serve`; it is on its way at once, whether anybody waits for the reply or not.

        Both raise `ReplicaUnavailableError` while the router is away.
        """
        return _Answer(self._actor, self._actor.handle().serve.remote(batch))

    async def snapshot(self) -> RouterSnapshot:
        """See `Router.snapshot`; raises `ReplicaUnavailableError` while the router is away."""
        try:
            snapshot: RouterSnapshot = await self._actor.handle().snapshot.remote()
        except RayError as error:
            self._actor.failed(error)
        return snapshot


class _Answer:
    """The reply to a call, with Ray's errors as ours."""

    def __init__(self, actor: NamedActor, call: Any) -> None:
        self._actor = actor
        self._call = call

    def __await__(self) -> Generator[Any, None, Reply]:
        return self._reply().__await__()

    async def _reply(self) -> Reply:
        try:
            reply: Reply = await self._call
        except RayError as error:
            self._actor.failed(error)
        return reply


class ReplicaAddress:
    """Where the replica actor of that name listens: Ray tells, requests and tokens go directly."""

    def __init__(self, name: str) -> None:
        self._actor = NamedActor(name)

    async def find(self) -> Address:
        """The address of its process now; raises `ReplicaUnavailableError`."""
        try:
            asked = self._actor.handle().address.remote()
            address: Address = await asyncio.wait_for(asked, ADDRESS_TIMEOUT_S)
        except RayError as error:
            self._actor.failed(error)
        except asyncio.TimeoutError as error:
            text = f"{self._actor.name} does not tell where it listens"
            raise ReplicaUnavailableError(text) from error
        return address


class RayReplica(WireReplica):
    """The replica actor of that name, as `Asks` has it; for one event loop."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ReplicaAddress(name).find)
        self._actor = NamedActor(name)

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """See `EngineReplica.ask`."""
        answer: T = await self._call("ask", question)
        return answer

    async def traces(self, question: Callable[[RequestLog], T]) -> T:
        """See `EngineReplica.traces`."""
        answer: T = await self._call("traces", question)
        return answer

    async def flush(self, timeout_s: float) -> bool:
        """See `EngineReplica.flush`."""
        return bool(await self._call("flush", timeout_s))

    async def _call(self, method: str, argument: object) -> Any:
        try:
            return await getattr(self._actor.handle(), method).remote(argument)
        except RayError as error:
            self._actor.failed(error)


def connect(config: ClusterConfig, metrics: Metrics | None = None) -> Dispatcher:
    """A dispatcher for the running cluster of that name; use it in one event loop only."""
    clients: dict[str, WireReplica] = {}

    def client(replica_id: str) -> WireReplica:
        if replica_id not in clients:
            clients[replica_id] = WireReplica(replica_id, ReplicaAddress(replica_id).find)
        return clients[replica_id]

    tokens_per_block = config.engine.kv_cache_config.tokens_per_block
    router = BatchingRouterClient(
        RayRouterClient(config.router_name).send,
        config.router.stride(tokens_per_block),
        config.router.fallback_after_s,
    )
    return Dispatcher(
        router,
        client,
        tokens_per_block,
        config.dispatch,
        metrics,
    )
