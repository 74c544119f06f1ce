"""The administration of a cache when a replica, a client or the time is gone."""

import asyncio

import pytest

from actors.questions import AskedReplica
from actors.router_snapshot import ReplicaSnapshot, RouterSnapshot
from cluster import admin_api, cache_admin
from cluster.endpoint.refusals import ClientGoneError
from cluster.endpoint.waiting import waited_for
from shared_cache.errors import ReplicaUnavailableError
from shared_cache.hashing import ReuseScope
from tests.cluster.administered import PROMPT, keys, routes


class Other:
    """Stands for a replica in another state: `ask` is what becomes of every question."""

    def __init__(self, ask) -> None:
        self._ask = ask

    async def ask(self, question):
        return await self._ask()


async def away():
    raise ReplicaUnavailableError("away")


async def forever():
    await asyncio.sleep(1000)


@pytest.mark.parametrize("ask", [away, forever])
async def test_a_deletion_names_whom_it_did_not_reach_and_fails_if_that_is_everybody(
    setup, monkeypatch, ask
):
    monkeypatch.setattr(cache_admin, "CHANGE_TIMEOUT_S", 1.0)
    async with setup({}) as one:
        await one.ask(0, "first")
        one.replicas.insert(0, AskedReplica("gone", Other(ask)))
        forgotten = await one.admin.forget([PROMPT, PROMPT[::-1]], ReuseScope())
        assert (forgotten.num_host_blocks, forgotten.skipped) == (4, ("gone",))
        assert (await one.admin.forget_all()).skipped == ("gone",)
        for nobody in (one.replicas[:1], []):
            one.replicas[:] = nobody
            with pytest.raises(ReplicaUnavailableError, match="no replica can be asked"):
                await one.admin.forget_all()
            with pytest.raises(ReplicaUnavailableError, match="no replica can be asked"):
                await one.admin.forget([PROMPT], ReuseScope())


async def test_a_look_does_not_wait_for_a_replica_that_hangs(setup, monkeypatch):
    monkeypatch.setattr(cache_admin, "LOOK_TIMEOUT_S", 1.0)
    async with setup({}) as one:
        one.replicas.append(AskedReplica("gone", Other(forever)))
        assert set((await one.admin.overview())["replicas"]) == {"r0"}


class Believes:
    """The router's view: one of two replicas is dead."""

    async def snapshot(self):
        replicas = tuple(
            ReplicaSnapshot(name, "boot", name == "r0", 0, 0, 0, 0) for name in ("r0", "r1")
        )
        return RouterSnapshot("round_robin", replicas, 0, 0, 0, 0, 0)


async def test_a_replica_that_the_router_takes_for_dead_is_named_by_a_deletion(setup, monkeypatch):
    issued, document = keys()
    async with routes(setup, document) as (both, client):
        client.app.state.cache_admin = None
        client.app.state.endpoint.router = Believes()
        found = {one.name: one for one in both.replicas}
        monkeypatch.setattr(admin_api, "asked_replicas", lambda names: [found[n] for n in names])
        client.headers["Authorization"] = f"Bearer {issued['admin']}"
        answer = await client.request("DELETE", "/v1/cache", json={"all": True})
        assert (answer.status_code, answer.json()["skipped"]) == (200, ["r1"])


class Hangs:
    """Answers nobody, and tells whether somebody waits."""

    def __init__(self) -> None:
        self.num_waiting = 0

    async def generate(self, request):
        self.num_waiting += 1
        try:
            await forever()
            yield
        finally:
            self.num_waiting -= 1


async def test_warming_ends_with_its_time_and_with_its_client(setup):
    issued, document = keys()
    body = {"prompts": "Never computed."}
    async with routes(setup, document, request_timeout_s=0.3) as (_, client):
        client.headers["Authorization"] = f"Bearer {issued['admin']}"
        hangs = client.app.state.endpoint.dispatcher = Hangs()
        answer = await client.post("/v1/cache/warm", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        assert hangs.num_waiting == 0

    async def left():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        await waited_for(anext(hangs.generate(None)), left, 60)
    assert hangs.num_waiting == 0


class Notes:
    """An administration that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def flush(self, names):
        self.asked.append(("flush", *names))
        return False

    async def pin(self, prompts, scope, ttl_s):
        self.asked.append(("pin", ttl_s))
        return {}


async def test_what_is_warmed_is_stored_before_it_is_pinned(setup):
    issued, document = keys()
    async with routes(setup, document) as (_, client):
        client.app.state.cache_admin = notes = Notes()
        client.headers["Authorization"] = f"Bearer {issued['admin']}"
        answer = await client.post("/v1/cache/warm", json={"prompts": "a", "pin_s": 9})
        assert answer.json()["stored"] is False
        assert notes.asked == [("flush", "r0"), ("pin", 9.0)]
