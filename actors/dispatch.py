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
from dataclasses import dataclass, replace
from typing import Protocol

from pydantic import Field

from actors.dispatch_state import ReplicaSearch, StreamSoFar
from actors.engine import GenerationRequest, Receipt, TokenChunk
from actors.metrics import Metrics, NullMetrics, Outcome
from actors.router_messages import Route
from shared_cache.config import Settings
from shared_cache.errors import (
    ReplicaBusyError,
    ReplicaUnavailableError,
    RequestError,
)
from shared_cache.hashing import BlockHash


class RouterClient(Protocol):
    """How a dispatcher reaches the router. Reports do not wait and never raise."""

    async def route(
        self,
        hashes: Sequence[BlockHash],
        num_prompt_tokens: int,
        avoid: Collection[str] = (),
        output_tokens: int | None = None,
    ) -> Route | None:
        """A booked choice for a prompt with these blocks; None when none but `avoid` is up.

        Raises `ReplicaUnavailableError` while the router is away and no replica is known.
        """

    def first_token(
        self, request_id: int, receipt: Receipt, prefill_s: float | None = None
    ) -> None:
        """The first token of a route is there; the engine took `prefill_s` for it."""

    def finished(
        self, request_id: int, hashes: Sequence[BlockHash], output_tokens: int = 0
    ) -> None:
        """A route has ended, well or not; `hashes` are all blocks that it left in the caches."""

    def mark_dead(self, replica_id: str, boot_id: str) -> None:
        """A replica did not serve to the end: it gets nothing until it shows that it is alive."""


class ReplicaClient(Protocol):
    """How a dispatcher reaches one replica."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `EngineReplica.generate`; a death is a `ReplicaUnavailableError`."""


class DispatchConfig(Settings):
    """How long a request looks for a replica that serves it to the end."""

    max_attempts: int = Field(8, ge=1, description="replicas that one request is sent to at most")
    first_wait_s: float = Field(
        10.0, ge=0, description="longest wait for a replica while none is up or all are full"
    )
    replica_wait_s: float = Field(
        60.0, ge=0, description="the same for a request that has left a replica already"
    )
    poll_interval_s: float = Field(0.1, gt=0, description="how often that wait asks the router")


@dataclass(frozen=True, slots=True)
class RoutedChunk:
    """A chunk and where it came from; `num_failovers` replicas were left before.

    Over the whole stream one chunk carries the receipt, the first, and one the finish reason, the
    last. With the receipt come `ttft_s`, the seconds from dispatch, and what the router predicted.
    """

    chunk: TokenChunk
    replica_id: str
    num_failovers: int = 0
    ttft_s: float | None = None
    predicted_ttft_s: float | None = None


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
        so_far = StreamSoFar(request, self._tokens_per_block)
        started_s = time.perf_counter()
        search = ReplicaSearch(self._config.first_wait_s, num_tokens=so_far.num_tokens)
        lost: ReplicaUnavailableError | None = None
        num_failovers = 0
        while num_failovers < self._config.max_attempts:
            route = await self._route(so_far, search)
            try:
                async with aclosing(self._attempt(route, so_far, started_s)) as stream:
                    async for chunk in stream:
                        ttft_s = predicted_s = None
                        if chunk.receipt is not None:
                            ttft_s = time.perf_counter() - started_s
                            predicted_s = route.first_token_s
                        yield RoutedChunk(
                            chunk, route.replica_id, num_failovers, ttft_s, predicted_s
                        )
                return
            except ReplicaBusyError:
                search.busy.add(route.replica_id)
            except ReplicaUnavailableError as error:
                lost = error
                num_failovers += 1
                self._router.mark_dead(route.replica_id, route.boot_id)
                self._metrics.failover(route.replica_id)
                if not so_far.max_new_tokens:  # only the word that this was all is missing
                    end = TokenChunk((), "", finish_reason="length")
                    yield RoutedChunk(end, route.replica_id, num_failovers)
                    return
                search.lost(error, so_far.num_tokens, self._config.replica_wait_s)
        raise ReplicaUnavailableError(
            f"{self._config.max_attempts} replicas failed this request one after the other; "
            f"the last one said: {lost}"
        ) from lost

    async def _attempt(
        self, route: Route, so_far: StreamSoFar, started_s: float
    ) -> AsyncGenerator[TokenChunk, None]:
        """What one replica gives; ends after the finish reason, or raises."""
        stream = self._replica(route.replica_id).generate(so_far.rest())
        has_started = False
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    if chunk.finish_reason == "abort":  # not by us: the engine closes
                        break
                    self._note(route, so_far, chunk, started_s)
                    seen = so_far.take(chunk)
                    has_started = True
                    yield seen
                    if chunk.finish_reason is not None:
                        return
            raise ReplicaUnavailableError(f"{route.replica_id} ended the stream early")
        finally:
            hashes = so_far.reusable_hashes() if has_started else ()
            self._router.finished(route.request_id, hashes, so_far.num_output_tokens)

    def _note(self, route: Route, so_far: StreamSoFar, chunk: TokenChunk, started_s: float) -> None:
        """Report a chunk to the router and the metrics."""
        if chunk.receipt is not None:
            self._router.first_token(route.request_id, chunk.receipt, chunk.prefill_s or None)
            if not so_far.has_receipt:
                ttft_s = time.perf_counter() - started_s
                self._metrics.first_token(route.replica_id, ttft_s, chunk.receipt)
        gap_s = so_far.gap_s(time.perf_counter())
        self._metrics.tokens(route.replica_id, len(chunk.token_ids), chunk.num_accepted, gap_s)

    async def _route(self, so_far: StreamSoFar, search: ReplicaSearch) -> Route:
        """A route, once there is one to a replica that has not just refused; waits until then.

        Those that were full are asked again after every wait.
        """
        while True:
            route = await self._route_once(so_far, search.busy)
            if route is not None:
                return route
            if time.monotonic() >= search.deadline_s:
                kind = ReplicaBusyError if search.busy else ReplicaUnavailableError
                why = "all replicas stayed full" if search.busy else "no replica came up"
                raise kind(f"{why} within {search.wait_s:g} s; send the request again later")
            await asyncio.sleep(self._config.poll_interval_s)
            search.busy.clear()

    async def _route_once(self, so_far: StreamSoFar, avoid: Collection[str]) -> Route | None:
        try:
            hashes = so_far.reusable_hashes()
            return await self._router.route(
                hashes, so_far.num_tokens, frozenset(avoid), so_far.max_new_tokens
            )
        except ReplicaUnavailableError:
            return None  # the router itself is restarting
