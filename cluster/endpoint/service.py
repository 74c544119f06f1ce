"""What every route of the endpoint works with: who may come in, how many, and who answers."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from actors.dispatch import RoutedChunk
from actors.engine import GenerationRequest, SamplingParams
from actors.router_snapshot import RouterSnapshot
from cluster.config import ServeConfig
from cluster.endpoint.access import Access
from cluster.endpoint.choices import Batches, ready_batches
from cluster.endpoint.gate import Gate
from cluster.endpoint.prompts import PromptEncoder
from cluster.endpoint.tenants import Tenant
from cluster.endpoint.tokenising import Tokenising
from shared_cache.errors import ReplicaBusyError
from shared_cache.hashing import ReuseScope


class Generates(Protocol):
    """What answers: a `Dispatcher`."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RoutedChunk, None]:
        """See `Dispatcher.generate`."""


class RouterView(Protocol):
    """Where the replicas' state is known."""

    async def snapshot(self) -> RouterSnapshot:
        """See `Router.snapshot`; raises `ReplicaUnavailableError` while the router is away."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request wants: `num_choices` continuations of each prompt."""

    response_id: str
    prompts: Sequence[tuple[int, ...]]
    sampling: SamplingParams
    scope: ReuseScope
    num_choices: int = 1

    def requests(self) -> list[GenerationRequest]:
        """One for each choice; those of one prompt draw with seeds that follow each other.

        The first one's id is that of the response, the others' are `<id>/1`, `<id>/2`, ...
        """
        sampling = [_with_seed(self.sampling, number) for number in range(self.num_choices)]
        wanted = [(prompt, one) for prompt in self.prompts for one in sampling]
        return [
            GenerationRequest(
                f"{self.response_id}/{index}" if index else self.response_id,
                prompt,
                one,
                self.scope,
            )
            for index, (prompt, one) in enumerate(wanted)
        ]


@dataclass(slots=True)
class Endpoint:
    """The state behind the routes of one ingress.

    `driver` is the Serve handle of the cluster's driver, None without Ray. Each check in
    `readiness` gives a reason why this ingress should get no requests now, or None.
    """

    model: str
    config: ServeConfig
    encoder: PromptEncoder
    dispatcher: Generates
    router: RouterView
    access: Access
    driver: Any = None
    max_total_tokens: int | None = None
    metrics_url: str | None = None
    readiness: list[Callable[[], Awaitable[str | None]]] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic
    created: int = field(default_factory=lambda: int(time.time()))
    gate: Gate = field(init=False)
    tokenising: Tokenising = field(init=False)
    last_token_s: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        self.gate = Gate(self.config.max_places)
        self.tokenising = Tokenising(self.encoder, self.max_total_tokens)

    async def batches(
        self, tenant: Tenant, num_places: int, prepare: Callable[[], Awaitable[Asked]]
    ) -> Batches:
        """All choices as they come out, `num_places` of them; closing this aborts them.

        `prepare` makes the request once it may come in: tokenising is work too. Raises what a
        refusal is before the first batch: `RefusedError`, `RequestError`,
        `ReplicaUnavailableError`.
        """
        with self._entered(tenant, num_places):
            try:
                asked = await prepare()
                streams = [partial(self.dispatcher.generate, one) for one in asked.requests()]
                source = ready_batches(streams, asked.num_choices, self.config.request_timeout_s)
                async with aclosing(source) as batches:
                    async for batch in batches:
                        self.last_token_s = self.clock()
                        yield batch
            except ReplicaBusyError as error:
                refusal = self.gate.overloaded(num_places, self.clock())
                raise refusal from error

    @contextmanager
    def _entered(self, tenant: Tenant, num_places: int) -> Iterator[None]:
        """While a request has its places; who is refused for want of them has used up nothing."""
        self.gate.enter(num_places, self.clock())
        is_served = False
        try:
            with self.access.entered(tenant, num_places):
                is_served = True
                yield
        finally:
            self.gate.leave(num_places, self.clock(), is_served)


def _with_seed(sampling: SamplingParams, number: int) -> SamplingParams:
    if number == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=sampling.seed + number)
