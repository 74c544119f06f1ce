"""Router and replicas as a dispatcher wants them, reached by name through Ray.

A handle stays bound to the actor it was made for, so it is looked up again by name after every
failure; and Ray's errors become ours, so that a caller needs to know only `shared_cache.errors`.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError

from actors.dispatch import Dispatcher
from actors.engine import GenerationRequest, Receipt, TokenChunk
from actors.metrics import Metrics
from actors.router import Route, RouterSnapshot
from cluster.config import ClusterConfig
from shared_cache.errors import KvcommonsError, ReplicaUnavailableError
from shared_cache.hashing import BlockHash

RAY_NAMESPACE = "kvcommons"


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
    """A `RouterClient` for the router actor of that name."""

    def __init__(self, name: str) -> None:
        self._actor = NamedActor(name)

    async def route(
        self, hashes: Sequence[BlockHash], num_prompt_tokens: int, avoid: Collection[str] = ()
    ) -> Route | None:
        """See `RouterClient.route`."""
        try:
            call = self._actor.handle().route.remote(hashes, num_prompt_tokens, avoid)
            route: Route | None = await call
        except RayError as error:
            self._actor.failed(error)
        return route

    async def snapshot(self) -> RouterSnapshot:
        """See `Router.snapshot`; raises `ReplicaUnavailableError` while the router is away."""
        try:
            snapshot: RouterSnapshot = await self._actor.handle().snapshot.remote()
        except RayError as error:
            self._actor.failed(error)
        return snapshot

    def first_token(self, reservation_id: int, receipt: Receipt) -> None:
        """See `RouterClient.first_token`."""
        self._tell("first_token", reservation_id, receipt)

    def finished(self, reservation_id: int, hashes: Sequence[BlockHash]) -> None:
        """See `RouterClient.finished`."""
        self._tell("finished", reservation_id, hashes)

    def mark_dead(self, replica_id: str, boot_id: str) -> None:
        """See `RouterClient.mark_dead`."""
        self._tell("mark_dead", replica_id, boot_id)

    def _tell(self, method: str, *arguments: object) -> None:
        """Send without waiting; a router that is away starts with empty books anyway."""
        try:
            getattr(self._actor.handle(), method).remote(*arguments)
        except ReplicaUnavailableError:
            return


class RayReplicaClient:
    """A `ReplicaClient` for the replica actor of that name."""

    def __init__(self, name: str) -> None:
        self._actor = NamedActor(name)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `EngineReplica.generate`."""
        stream = self._actor.handle().stream.options(num_returns="streaming").remote(request)
        has_ended = False
        try:
            async for message in stream:
                for chunk in await message:
                    yield chunk
            has_ended = True
        except RayError as error:
            has_ended = True
            self._actor.failed(error)
        finally:
            if not has_ended:
                ray.cancel(stream)  # dropping the stream would leave the request running


def connect(config: ClusterConfig, metrics: Metrics | None = None) -> Dispatcher:
    """A dispatcher for the running cluster of that name; use it in one event loop only."""
    clients: dict[str, RayReplicaClient] = {}

    def client(replica_id: str) -> RayReplicaClient:
        return clients.setdefault(replica_id, RayReplicaClient(replica_id))

    return Dispatcher(
        RayRouterClient(config.router_name),
        client,
        config.engine.kv_cache_config.tokens_per_block,
        config.dispatch,
        metrics,
    )
