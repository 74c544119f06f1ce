"""An ingress's side of the router: many requests in one message, an own view while it is away.

A message costs more than a decision, so what comes together is sent together, and reports wait for
a request to go along with. And a router that is restarted or stuck must not stop answers: a request
that has waited too long goes where this ingress has the fewest requests itself; when the router is
back, it is told what runs where.
"""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from actors.batch_sender import BatchSender
from actors.own_view import OwnView
from actors.receipt import Receipt
from actors.router_messages import (
    Batch,
    Finished,
    FirstToken,
    Lost,
    Reply,
    Report,
    Route,
    RouteRequest,
    Running,
)
from actors.routing.index import routing_keys
from shared_cache.errors import ReplicaUnavailableError
from shared_cache.hashing import BlockHash

logger = logging.getLogger(__name__)

RETRY_S = 0.1
"""How often a router that is away is asked again."""

REPORTS_WAIT_S = 0.005
"""How long reports wait for a request, or for more of their kind."""

HELD_UP_S = 0.01
"""A timer that is later than this tells of this process: its event loop was held up."""

MOST_TIMES = 10
"""How often such a loop waits once more, as long as it was late, for what may be there."""

HANG_S = 5.0
"""A message without an answer for so long is given up; the router may be stuck."""

MAX_KEPT_REPORTS = 10_000
"""Reports that wait for a router that is away; its bookings expire without them."""

Send = Callable[[Batch], Awaitable[Reply]]
"""Sends a batch to the router (`Router.serve`) at once; the reply may be awaited or not.

Both raise `ReplicaUnavailableError`.
"""


@dataclass(slots=True)
class _Asked:
    """A request that waits for its route."""

    request: RouteRequest
    answer: "asyncio.Future[Route | None]"
    timer: asyncio.TimerHandle
    started_s: float


@dataclass(slots=True)
class _Open:
    """A request that runs."""

    route: Route
    request: RouteRequest
    started_s: float
    has_first_token: bool = False

    def running(self) -> Running:
        """What a router is told that has not chosen its replica."""
        route, num_tokens = self.route, self.request.num_tokens
        return Running(
            route.request_id, route.replica_id, route.boot_id, num_tokens, self.has_first_token
        )


class BatchingRouterClient:
    """A `RouterClient` for one event loop; `send` reaches the router.

    `stride` is every how manieth block the router knows. A route that does not come within
    `fallback_after_s` is chosen here.
    """

    def __init__(
        self,
        send: Send,
        stride: int = 1,
        fallback_after_s: float = 0.1,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_fallbacks = 0
        self._send = send
        self._stride = stride
        self._fallback_after_s = fallback_after_s
        self._rng = rng or random.Random()
        self._clock = clock
        self._next_id = secrets.randbits(48) << 64
        self._view = OwnView()
        self._asked: dict[int, _Asked] = {}
        self._unsent: list[RouteRequest] = []
        self._reports: list[Report] = []
        self._open: dict[int, _Open] = {}
        self._known: set[int] = set()  # open requests that the router has booked
        self._sender = BatchSender(self._send_next, self._how_soon)
        self._is_urgent = self._is_away = self._has_warned = False

    @property
    def is_away(self) -> bool:
        """Whether requests are sent by this ingress's own view now."""
        return self._is_away

    async def route(
        self,
        hashes: Sequence[BlockHash],
        num_prompt_tokens: int,
        avoid: Collection[str] = (),
        output_tokens: int | None = None,
    ) -> Route | None:
        """See `RouterClient.route`; raises `ReplicaUnavailableError` if no replica is known yet."""
        self._next_id += 1
        keys = routing_keys(hashes, self._stride)
        request = RouteRequest(self._next_id, num_prompt_tokens, keys, tuple(avoid), output_tokens)
        if not self._is_away:
            return await self._ask(request)
        self._is_urgent = True
        self._sender.wake()
        return self._own_choice(request, self._clock())

    def first_token(
        self, request_id: int, receipt: Receipt, prefill_s: float | None = None
    ) -> None:
        """See `RouterClient.first_token`."""
        one = self._open.get(request_id)
        if one is not None:
            one.has_first_token = True
            ttft_s = self._clock() - one.started_s
            self._report(FirstToken(request_id, receipt, ttft_s, prefill_s))

    def finished(
        self, request_id: int, hashes: Sequence[BlockHash], output_tokens: int = 0
    ) -> None:
        """See `RouterClient.finished`."""
        one = self._open.pop(request_id, None)
        if one is None:
            return
        self._known.discard(request_id)
        self._view.count(one.route.replica_id, -1)
        num_known = len(one.request.keys) * self._stride
        new_keys = routing_keys(hashes[num_known:], self._stride)
        self._report(Finished(request_id, new_keys, output_tokens))

    def mark_dead(self, replica_id: str, boot_id: str) -> None:
        """See `RouterClient.mark_dead`."""
        self._view.dead[replica_id] = boot_id
        self._is_urgent = True
        self._report(Lost(replica_id, boot_id))

    async def _ask(self, request: RouteRequest) -> Route | None:
        future = asyncio.get_running_loop().create_future()
        timer = self._timer(request.request_id, self._fallback_after_s)
        asked = _Asked(request, future, timer, self._clock())
        self._asked[request.request_id] = asked
        self._unsent.append(request)
        self._sender.wake()
        try:
            return await asked.answer
        except asyncio.CancelledError:
            if self._asked.pop(request.request_id, None) is None:
                self.finished(request.request_id, [])
            else:
                self._report(Finished(request.request_id))
            raise
        finally:
            asked.timer.cancel()

    def _timer(self, request_id: int, after_s: float, times: int = 1) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + after_s
        return loop.call_at(due_s, self._may_give_up, request_id, due_s, times)

    def _may_give_up(self, request_id: int, due_s: float, times: int) -> None:
        """Time is up; but in a loop that was held up, the answer may only not have been read."""
        late_s = asyncio.get_running_loop().time() - due_s
        asked = self._asked.get(request_id)
        is_held_up = late_s > HELD_UP_S and times < MOST_TIMES and not self._is_away
        if asked is not None and is_held_up:
            asked.timer = self._timer(request_id, min(self._fallback_after_s, late_s), times + 1)
        else:
            self._give_up(request_id)

    def _give_up(self, request_id: int) -> None:
        """The router is late: this request, and those that follow, are routed without it."""
        asked = self._asked.pop(request_id, None)
        if asked is None or asked.answer.done():
            return  # it has come in this moment
        self._is_away = True
        try:
            route = self._own_choice(asked.request, asked.started_s)
        except ReplicaUnavailableError as error:
            asked.answer.set_exception(error)
        else:
            asked.answer.set_result(route)
        if request_id not in self._open:  # should the router still book it, it is to end
            self._reports.append(Finished(request_id))

    def _own_choice(self, request: RouteRequest, started_s: float) -> Route | None:
        view = self._view
        if not view.boots:
            raise ReplicaUnavailableError("the router is away, and no replica is known yet")
        chosen = view.least_busy(request.avoid, self._rng)
        if chosen is None:
            return None
        self.num_fallbacks += 1
        if not self._has_warned:
            self._has_warned = True
            logger.warning("the router does not answer: requests are routed by this view alone")
        route = Route(request.request_id, chosen, view.boots[chosen])
        self._begin(route, request, started_s)
        return route

    def _begin(self, route: Route, request: RouteRequest, started_s: float) -> None:
        self._open[request.request_id] = _Open(route, request, started_s)
        self._view.count(route.replica_id, 1)

    def _report(self, report: Report) -> None:
        if len(self._reports) < MAX_KEPT_REPORTS:
            self._reports.append(report)
        self._sender.wake()

    def _how_soon(self) -> float | None:
        """A router that is away is asked now and then, while anything of ours runs or comes."""
        if self._is_away:
            return RETRY_S if self._open or self._asked or self._is_urgent else None
        if self._unsent or self._is_urgent:
            return 0.0
        return REPORTS_WAIT_S if self._reports else None

    def _send_next(self) -> Callable[[], Awaitable[None]]:
        reports, self._reports = self._reports, []
        requests, self._unsent = self._unsent, []
        self._is_urgent = False
        waiting = tuple(one for one in requests if one.request_id in self._asked)
        batch = Batch(tuple(reports), waiting, self._view.version)
        try:
            answer = self._send(batch)
        except ReplicaUnavailableError:
            answer = None
        return partial(self._take_in, batch, answer)

    async def _take_in(self, batch: Batch, answer: Awaitable[Reply] | None) -> None:
        if answer is None:
            self._lost(batch)
            return
        # Not `wait_for`: before Python 3.12 an answer in that moment hides a cancellation, and the
        # end of a loop would wait for this for ever.
        asked = asyncio.ensure_future(answer)
        asked.add_done_callback(_retrieved)
        try:
            await asyncio.wait({asked}, timeout=HANG_S)
        finally:
            asked.cancel()
        if not asked.done() or asked.cancelled() or asked.exception() is not None:
            self._lost(batch)
        else:
            self._answered(batch, asked.result())

    def _lost(self, batch: Batch) -> None:
        self._is_away = True
        self._reports = [*batch.reports, *self._reports][-MAX_KEPT_REPORTS:]
        for request_id in list(self._asked):
            self._give_up(request_id)

    def _answered(self, batch: Batch, reply: Reply) -> None:
        is_new = reply.version[0] != self._view.version[0]
        if is_new and not reply.replicas and self._view.boots:
            self._lost(Batch())  # it has just started, and nobody has told it of replicas yet
            return
        if is_new:
            self._known.clear()
        self._view.told(reply, self._reports)
        self._is_away = False
        if self._has_warned:
            self._has_warned = False
            logger.warning("the router answers again; %d routes without it", self.num_fallbacks)
        for request, route in zip(batch.requests, reply.routes, strict=True):
            self._arrived(request, route)
        unknown = [one for name, one in self._open.items() if name not in self._known]
        self._reports += [one.running() for one in unknown]
        self._known.update(self._open)

    def _arrived(self, request: RouteRequest, route: Route | None) -> None:
        """The router has decided; perhaps the caller has gone, or was sent elsewhere meanwhile."""
        asked = self._asked.pop(request.request_id, None)
        if asked is not None and not asked.answer.done():
            if route is not None:
                self._begin(route, request, asked.started_s)
                self._known.add(request.request_id)
            asked.answer.set_result(route)
        elif request.request_id not in self._open:
            self._reports.append(Finished(request.request_id))


def _retrieved(answer: "asyncio.Future[Reply]") -> None:
    error = None if answer.cancelled() else answer.exception()
    if error is not None and not isinstance(error, ReplicaUnavailableError):
        logger.error("the router failed: %r", error)
