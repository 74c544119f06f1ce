"""Dispatch: one request in, one unbroken stream out, whatever happens to the replicas.

The caller holds every token that came out, so it is the caller who can carry on elsewhere when a
replica dies; no other part keeps state about streams. Tokens and text go on exactly where they
stopped: the next replica gets the prompt and the tokens so far, which decide what text was sent.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from pydantic import Field

from actors.engine import GenerationRequest, Receipt, TokenChunk
from actors.metrics import Metrics, NullMetrics, Outcome
from actors.router import Route
from shared_cache.config import Settings
from shared_cache.errors import (
    ReplicaBusyError,
    ReplicaRefusedError,
    ReplicaUnavailableError,
    RequestError,
)
from shared_cache.hashing import BlockHash, BlockHashChain


class RouterClient(Protocol):
    """How a dispatcher reaches the router. Reports do not wait and never raise."""

    async def route(
        self, hashes: Sequence[BlockHash], num_prompt_tokens: int, avoid: Collection[str] = ()
    ) -> Route | None:
        """See `Router.route`; raises `ReplicaUnavailableError` while the router is away."""

    def first_token(self, reservation_id: int, receipt: Receipt) -> None:
        """See `Router.first_token`."""

    def finished(self, reservation_id: int, hashes: Sequence[BlockHash]) -> None:
        """See `Router.finished`."""

    def mark_dead(self, replica_id: str, boot_id: str) -> None:
        """See `Router.mark_dead`."""


class ReplicaClient(Protocol):
    """How a dispatcher reaches one replica."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `EngineReplica.generate`; a death is a `ReplicaUnavailableError`."""


MAX_FRUITLESS_DEATHS = 2
"""A request that so many replicas died of in a row, with no new token, is not sent to another one:
it may be what kills them."""


class DispatchConfig(Settings):
    """How long a request looks for a replica that serves it to the end."""

    max_attempts: int = Field(8, ge=1, description="replicas that one request is sent to at most")
    replica_wait_s: float = Field(
        60.0, ge=0, description="longest wait for a replica while none is up or all are full"
    )
    poll_interval_s: float = Field(0.1, gt=0, description="how often that wait asks the router")


@dataclass(frozen=True, slots=True)
class RoutedChunk:
    """A chunk and where it came from; `num_failovers` replicas were left before.

    Over the whole stream one chunk carries the receipt, the first, and one the finish reason, the
    last.
    """

    chunk: TokenChunk
    replica_id: str
    num_failovers: int = 0


class _Sequence:
    """What came out so far of one request."""

    def __init__(self, request: GenerationRequest, tokens_per_block: int) -> None:
        self.has_receipt = False
        self._request = request
        self._tokens: list[int] = []
        self._chain = BlockHashChain(tokens_per_block, request.scope, request.prompt_token_ids)

    def take(self, chunk: TokenChunk) -> TokenChunk:
        """Note a chunk; the chunk as the caller shall see it, with the first receipt only."""
        self._tokens.extend(chunk.token_ids)
        self._chain.extend(chunk.token_ids)
        seen = replace(chunk, receipt=None) if self.has_receipt else chunk
        self.has_receipt = self.has_receipt or chunk.receipt is not None
        return seen

    def rest(self) -> GenerationRequest:
        """The request for what has not come out yet."""
        return self._request.continued(tuple(self._tokens))

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of what came out."""
        return self._chain.num_tokens

    def reusable_hashes(self) -> Sequence[BlockHash]:
        """The blocks that may be reused: the KV of the last token is not there yet."""
        return self._chain.hashes[: (self.num_tokens - 1) // self._chain.tokens_per_block]


@dataclass(slots=True)
class _Search:
    """One request's search for a replica: how long it may last, and who has refused meanwhile.

    `num_deaths` counts replicas that died in a row without a new token of this request.
    """

    deadline_s: float
    busy: set[str] = field(default_factory=set)
    num_deaths: int = 0
    num_tokens: int = 0

    def lost(self, error: ReplicaUnavailableError, num_tokens: int, deadline_s: float) -> None:
        """A replica did not serve to the end; `num_tokens` there are now. The search goes on.

        Raises when this request may be what kills replicas.
        """
        if num_tokens > self.num_tokens:
            self.num_deaths, self.num_tokens = 0, num_tokens
        elif not isinstance(error, ReplicaRefusedError):
            self.num_deaths += 1
        if self.num_deaths >= MAX_FRUITLESS_DEATHS:
            raise ReplicaUnavailableError(
                f"{self.num_deaths} replicas ended one after the other before this request's next "
                "token; it is not tried on another one, as it may be the cause: look into their "
                f"logs before sending it again. The last one said: {error}"
            ) from error
        self.deadline_s = deadline_s


class Dispatcher:
    """Sends requests to replicas and streams back; safe to use from many tasks of one event loop.

    `replica` gives the client of a replica by its id.
    """

    def __init__(
        self,
        router: RouterClient,
        replica: Callable[[str], ReplicaClient],
        tokens_per_block: int,
        config: DispatchConfig | None = None,
        metrics: Metrics | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._router = router
        self._replica = replica
        self._tokens_per_block = tokens_per_block
        self._config = config or DispatchConfig()
        self._metrics = metrics or NullMetrics()
        self._rng = rng or random.Random()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RoutedChunk, None]:
        """Stream the continuation of `request`; closing this aborts it.

        A request without a seed gets one here, so that it draws the same tokens wherever it goes
        on. Raises `RequestError` when it can never be served, `ReplicaUnavailableError` when no
        replica served it within the configured attempts and wait.
        """
        outcome: Outcome = "cancelled"
        try:
            async with aclosing(self._attempts(self._seeded(request))) as stream:
                async for routed in stream:
                    if routed.chunk.finish_reason in ("stop", "length"):
                        outcome = "stop" if routed.chunk.finish_reason == "stop" else "length"
                    yield routed
        except RequestError:
            outcome = "rejected"
            raise
        except ReplicaUnavailableError:
            outcome = "unavailable"
            raise
        except Exception:
            outcome = "error"
            raise
        finally:
            self._metrics.finished(outcome)

    def _seeded(self, request: GenerationRequest) -> GenerationRequest:
        if request.sampling.seed is not None:
            return request
        seed = self._rng.getrandbits(62)
        return replace(request, sampling=replace(request.sampling, seed=seed))

    async def _attempts(self, request: GenerationRequest) -> AsyncGenerator[RoutedChunk, None]:
        sequence = _Sequence(request, self._tokens_per_block)
        started_s = time.perf_counter()
        search = _Search(self._deadline_s(), num_tokens=sequence.num_tokens)
        lost: ReplicaUnavailableError | None = None
        num_failovers = 0
        while num_failovers < self._config.max_attempts:
            route = await self._route(sequence, search)
            try:
                async with aclosing(self._attempt(route, sequence, started_s)) as stream:
                    async for chunk in stream:
                        yield RoutedChunk(chunk, route.replica_id, num_failovers)
                return
            except ReplicaBusyError:
                search.busy.add(route.replica_id)
            except ReplicaUnavailableError as error:
                lost = error
                num_failovers += 1
                self._router.mark_dead(route.replica_id, route.boot_id)
                self._metrics.failover(route.replica_id)
                search.lost(error, sequence.num_tokens, self._deadline_s())
        raise ReplicaUnavailableError(
            f"{self._config.max_attempts} replicas failed this request one after the other; "
            f"the last one said: {lost}"
        ) from lost

    async def _attempt(
        self, route: Route, sequence: _Sequence, started_s: float
    ) -> AsyncGenerator[TokenChunk, None]:
        """What one replica gives; ends after the finish reason, or raises."""
        stream = self._replica(route.replica_id).generate(sequence.rest())
        has_started = False
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    if chunk.finish_reason == "abort":  # not by us: the engine closes
                        break
                    self._note(route, sequence, chunk, started_s)
                    seen = sequence.take(chunk)
                    has_started = True
                    yield seen
                    if chunk.finish_reason is not None:
                        return
            raise ReplicaUnavailableError(f"{route.replica_id} ended the stream early")
        finally:
            hashes = sequence.reusable_hashes() if has_started else ()
            self._router.finished(route.reservation_id, hashes)

    def _note(self, route: Route, sequence: _Sequence, chunk: TokenChunk, started_s: float) -> None:
        """Report a chunk to the router and the metrics."""
        if chunk.receipt is not None:
            self._router.first_token(route.reservation_id, chunk.receipt)
            if not sequence.has_receipt:
                ttft_s = time.perf_counter() - started_s
                self._metrics.first_token(route.replica_id, ttft_s, chunk.receipt)
        self._metrics.tokens(route.replica_id, len(chunk.token_ids), chunk.num_accepted)

    def _deadline_s(self) -> float:
        return time.monotonic() + self._config.replica_wait_s

    async def _route(self, sequence: _Sequence, search: _Search) -> Route:
        """A route, once there is one to a replica that has not just refused; waits until then.

        Those that were full are asked again after every wait.
        """
        while True:
            route = await self._route_once(sequence, search.busy)
            if route is not None:
                return route
            if time.monotonic() >= search.deadline_s:
                why = "all replicas stayed full" if search.busy else "no replica came up"
                raise ReplicaUnavailableError(
                    f"{why} within {self._config.replica_wait_s:g} s; send the request again later"
                )
            await asyncio.sleep(self._config.poll_interval_s)
            search.busy.clear()

    async def _route_once(self, sequence: _Sequence, avoid: Collection[str]) -> Route | None:
        try:
            hashes = sequence.reusable_hashes()
            return await self._router.route(hashes, sequence.num_tokens, frozenset(avoid))
        except ReplicaUnavailableError:
            return None  # the router itself is restarting
