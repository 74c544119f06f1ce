"""An ingress and its router: what is sent together, and what happens while the router is away."""

import asyncio
import time
from contextlib import suppress
from unittest.mock import Mock

import pytest

from actors.engine import Receipt
from actors.router import Router, RouterConfig
from actors.router_client import MOST_TIMES, RETRY_S, BatchingRouterClient
from actors.router_messages import Batch, Finished, ReplicaInfo, Running
from actors.routing.index import routing_keys
from shared_cache.errors import ReplicaUnavailableError
from shared_cache.hashing import block_hashes

BLOCK = 4
FOREVER_S = 60.0
"""A limit that no test comes near."""


def new_router(*replicas: str, boot="1") -> Router:
    router = Router(RouterConfig(policy="least_outstanding"), BLOCK, shares=False)
    for name in replicas:
        router.register(ReplicaInfo(name, boot))
    return router


class Link:
    """The way to a router that may be away, silent, or another one."""

    def __init__(self, router: Router | None) -> None:
        self.router = router
        self.is_silent = False
        self.fails_at_once = False
        self.batches: list[Batch] = []

    def send(self, batch: Batch):
        if self.router is None and self.fails_at_once:
            raise ReplicaUnavailableError("no actor runs now")
        return Answer(self, batch)


class Answer:
    """What is sent arrives at once, the reply a little later."""

    def __init__(self, link: Link, batch: Batch) -> None:
        self.link = link
        self.reply = None
        if link.router is not None and not link.is_silent:
            link.batches.append(batch)
            self.reply = link.router.serve(batch)

    def __await__(self):
        return self.wait().__await__()

    async def wait(self):
        await asyncio.sleep(0)
        if self.link.is_silent:
            await asyncio.Event().wait()
        if self.reply is None:
            raise ReplicaUnavailableError("the actor has died")
        return self.reply


def client_of(link: Link, fallback_after_s=FOREVER_S, stride=1) -> BatchingRouterClient:
    return BatchingRouterClient(link.send, stride, fallback_after_s)


async def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that within 30 s")


def outstanding(router: Router) -> dict[str, int]:
    return {one.replica_id: one.num_outstanding for one in router.snapshot().replicas}


async def test_what_comes_together_is_sent_together():
    link = Link(new_router("a", "b"))
    client = client_of(link)
    routes = await asyncio.gather(*[client.route([], 8) for _ in range(50)])
    assert len(link.batches) <= 2
    assert outstanding(link.router) == {"a": 25, "b": 25}
    assert len({one.request_id for one in routes}) == 50
    for one in routes:
        client.first_token(one.request_id, Receipt(8, 0, 0, 0, 8))
        client.finished(one.request_id, [])
    await until(lambda: outstanding(link.router) == {"a": 0, "b": 0})
    assert len(link.batches) <= 4


async def test_prompts_are_told_in_steps_and_outputs_go_on_where_they_end():
    link = Link(new_router("a"))
    client = client_of(link, stride=2)
    hashes = block_hashes(range(40), BLOCK)
    route = await client.route(hashes[:5], 20)
    client.first_token(route.request_id, Receipt(20, 0, 0, 0, 20))
    client.finished(route.request_id, hashes, output_tokens=20)
    await until(lambda: link.router.snapshot().num_reservations == 0)
    assert link.router.snapshot().replicas[0].known_blocks == 5


async def test_reports_and_requests_stay_in_order():
    link = Link(new_router("a", "b"))
    client = client_of(link)
    first = await client.route([], 8)
    client.mark_dead(first.replica_id, "1")
    for _ in range(3):
        assert (await client.route([], 8)).replica_id != first.replica_id


@pytest.mark.parametrize("fails_at_once", [True, False])
async def test_while_its_router_is_dead_a_client_chooses_itself_and_tells_the_next_one(
    fails_at_once,
):
    link = Link(new_router("a", "b"))
    link.fails_at_once = fails_at_once
    client = client_of(link)
    before = [await client.route([], 80) for _ in range(2)]
    client.first_token(before[0].request_id, Receipt(80, 0, 0, 0, 80))
    link.router = None
    during = await asyncio.gather(*[client.route([], 80) for _ in range(4)])
    assert client.is_away
    assert client.num_fallbacks == 4
    assert sorted(one.replica_id for one in during) == ["a", "a", "b", "b"]
    assert all(one.first_token_s is None for one in during)
    client.finished(before[1].request_id, [])
    link.router = new_router()  # just started: nobody has told it of replicas
    assert (await client.route([], 80)).first_token_s is None
    for name in ("a", "b"):
        link.router.register(ReplicaInfo(name, "1"))
    await until(lambda: not client.is_away)
    await until(lambda: sum(outstanding(link.router).values()) == 6)
    after = await client.route([], 8)
    assert after.first_token_s is not None
    for one in (before[0], *during, after):
        client.finished(one.request_id, [])
    await until(lambda: sum(outstanding(link.router).values()) == 1)  # the one before the last


async def test_the_own_view_leaves_out_who_has_failed_here_until_the_router_says_otherwise():
    link = Link(new_router("a", "b"))
    client = client_of(link)
    await client.route([], 8)
    router, link.router = link.router, None
    client.mark_dead("b", "1")
    assert {(await client.route([], 8)).replica_id for _ in range(5)} == {"a"}
    router.register(ReplicaInfo("b", "2"))
    link.router = router
    await until(lambda: not client.is_away)
    link.router = None
    assert (await client.route([], 8)).replica_id == "b"


async def test_a_router_that_is_silent_is_waited_for_a_moment_only():
    link = Link(new_router("a", "b"))
    client = client_of(link, fallback_after_s=0.01)
    await until_routed(client)
    link.is_silent = True
    assert await asyncio.wait_for(client.route([], 8), 30) is not None
    assert client.is_away
    assert await client.route([], 8, avoid=("a", "b")) is None


@pytest.mark.parametrize(("held_up_s", "is_away"), [(0.5, False), (0.0, True)])
async def test_a_loop_that_is_held_up_does_not_take_its_router_for_silent(held_up_s, is_away):
    """An answer that is there, and could not be read, is no sign of a router that is away."""
    router = new_router("a", "b")
    client = client_of(Link(router))
    await client.route([], 8)
    arrived = asyncio.Event()

    class Later:
        def __init__(self, batch: Batch) -> None:
            self.reply = router.serve(batch)

        def __await__(self):
            yield from arrived.wait().__await__()
            return self.reply

    client._send = Later
    client._fallback_after_s = 0.2
    asked = asyncio.create_task(client.route([], 8))
    await asyncio.sleep(0.05)
    if held_up_s:
        asyncio.get_running_loop().call_later(0.1, arrived.set)
    time.sleep(held_up_s)
    await asked
    assert client.is_away is is_away
    assert client.num_fallbacks == is_away


async def test_a_loop_that_is_always_held_up_waits_for_its_router_some_time_only(monkeypatch):
    monkeypatch.setattr("actors.router_client.HELD_UP_S", -1.0)
    link = Link(new_router("a", "b"))
    client = client_of(link)
    await client.route([], 8)
    link.is_silent = True
    client._fallback_after_s = 0.01
    client._timer = Mock(side_effect=client._timer)
    assert await asyncio.wait_for(client.route([], 8), 30) is not None
    assert client._timer.call_count == MOST_TIMES
    assert client.is_away


async def until_routed(client: BatchingRouterClient) -> None:
    """The router has answered once; on a busy machine the first times may be too late."""
    while not client._view.boots:
        with suppress(ReplicaUnavailableError):
            await client.route([], 8)
        await asyncio.sleep(0.005)


async def test_an_answer_that_comes_too_late_is_taken_back():
    router = new_router("a", "b")
    link = Link(router)
    client = client_of(link)
    await client.route([], 8)
    gate = asyncio.Event()

    class Late:
        """Not a coroutine: what is sent at the end of a loop is not waited for."""

        def __init__(self, batch: Batch) -> None:
            self.batch = batch

        def __await__(self):
            yield from gate.wait().__await__()
            return router.serve(self.batch)

    client._send = Late
    client._fallback_after_s = 0.01
    route = await client.route([], 8)
    gate.set()
    await until(lambda: not client.is_away)
    await until(lambda: outstanding(router)[route.replica_id] >= 1)
    assert sum(outstanding(router).values()) == 2, "booked once, where it runs"


async def test_a_caller_that_goes_away_leaves_no_booking():
    link = Link(new_router("a"))
    client = client_of(link)
    task = asyncio.create_task(client.route([], 8))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.route([], 8)
    await until(lambda: outstanding(link.router) == {"a": 1})


async def test_without_any_view_a_router_that_is_away_is_an_error():
    client = client_of(Link(None))
    with pytest.raises(ReplicaUnavailableError, match="away"):
        await client.route([], 8)
    link = Link(new_router())
    assert await client_of(link).route([], 8) is None


async def test_a_router_that_is_away_for_long_does_not_collect_reports_without_end(monkeypatch):
    monkeypatch.setattr("actors.router_client.MAX_KEPT_REPORTS", 5)
    link = Link(new_router("a"))
    client = client_of(link)
    await client.route([], 8)
    link.router = None
    for _ in range(20):
        client.mark_dead("x", "1")
    await asyncio.sleep(0.01)
    assert len(client._reports) <= 5
    assert not [one for one in client._reports if isinstance(one, Running)]


async def test_a_router_that_is_gone_is_asked_no_more_when_nothing_runs():
    link = Link(new_router("a"))
    sent = []
    client = BatchingRouterClient(lambda batch: (sent.append(batch), link.send(batch))[1])
    one = await client.route([], 8)
    link.router = None
    client.finished(one.request_id, [])
    await until(lambda: client.is_away)
    num_sent = len(sent)
    await asyncio.sleep(3 * RETRY_S)
    assert len(sent) == num_sent
    link.router = new_router("a")
    await client.route([], 8)  # by its own view; meanwhile the router is asked
    await until(lambda: not client.is_away)
    assert sent[-1].reports[0] == Finished(one.request_id, routing_keys([]))


async def test_who_comes_before_the_router_finds_it_later():
    link = Link(None)
    client = client_of(link)
    with pytest.raises(ReplicaUnavailableError):
        await client.route([], 8)
    link.router = new_router("a")
    with pytest.raises(ReplicaUnavailableError):
        await client.route([], 8)
    await until(lambda: not client.is_away)
    assert (await client.route([], 8)).replica_id == "a"


async def test_a_cancellation_is_heard_while_a_router_dies():
    """The end of a loop cancels what runs, and waits for it."""
    answers: list[asyncio.Future] = []

    def send(batch):
        answers.append(asyncio.get_running_loop().create_future())
        return answers[-1]

    client = BatchingRouterClient(send)
    client.mark_dead("a", "1")
    await until(lambda: answers)
    await asyncio.sleep(0.01)
    sender = client._sender._task
    answers[0].set_exception(ReplicaUnavailableError("the actor has died"))
    sender.cancel()
    await asyncio.wait({sender}, timeout=5)
    assert sender.cancelled()


def test_what_is_reported_last_arrives_although_the_loop_ends():
    link = Link(new_router("a"))

    async def one_request():
        client = client_of(link)
        routes = [await client.route([], 8) for _ in range(3)]
        for route in routes:
            client.finished(route.request_id, [])

    asyncio.run(one_request())
    assert outstanding(link.router) == {"a": 0}
