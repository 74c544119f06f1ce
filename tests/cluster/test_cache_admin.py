"""The administration of a running cache, on real replicas of a tiny model; the routes on top."""

import time
from dataclasses import replace

import pytest

from actors.engine import GenerationRequest, Receipt, SamplingParams
from actors.request_log import RequestLog, RequestTrace
from actors.why import WHY, KnownBlock, verdict
from cluster.endpoint.access import Access
from shared_cache.errors import ReplicaUnavailableError, RequestError
from shared_cache.fates import BlockState, Fate, Fates
from shared_cache.hashing import BlockHash, ReuseScope
from tests.cluster.administered import PROMPT, TokenPerByte, keys, routes
from tests.tiny_replicas import BLOCK


def objects(folder):
    return list((folder / "store").rglob("*.arrow"))


async def test_a_first_request_found_nothing_and_the_next_one_all(setup):
    async with setup({}, {}) as both:
        await both.ask(0, "first")
        receipt = await both.ask(1, "second")
        assert receipt.shared == 4 * BLOCK
        assert await both.reason("first") == "not_stored"
        assert await both.reason("second") == "complete"
        (explained,) = await both.admin.explain("first")
        data = explained.as_data()
        assert (data["broken_block"], data["replica"], data["reusable_blocks"]) == (0, "r0", 4)
        assert await both.admin.explain("nobody's") == []


async def test_the_block_where_prompts_part_is_the_one_that_broke_the_chain(setup):
    async with setup({}) as one:
        await one.ask(0, "first")
        await one.ask(0, "other", (*PROMPT[: 2 * BLOCK], *range(3, 3 + 2 * BLOCK)))
        (explained,) = await one.admin.explain("other")
        assert explained.verdict.broken_block == 2
        assert explained.verdict.reason == "not_stored"


async def test_what_was_deleted_since_is_told_from_what_never_was(setup, tmp_path):
    async with setup({}, {}) as both:
        await both.ask(0, "first")
        for path in objects(tmp_path):
            path.unlink()
        await both.ask(1, "second")
        assert await both.reason("second") == "evicted"
        (explained,) = await both.admin.explain("second")
        assert "at r0: stored, had by request first" in explained.verdict.details


async def test_a_dropped_save_is_told(setup):
    async with setup({"cache": {"save_queue_bytes": 0}}, {}) as both:
        await both.ask(0, "first")
        await both.ask(1, "second")
        assert await both.reason("second") == "dropped_save"


async def test_a_block_in_another_namespace_is_told_with_the_field_that_differs(setup):
    async with setup({"revision": "old"}, {"revision": "new"}) as both:
        await both.ask(0, "first")
        await both.ask(1, "second")
        (explained,) = await both.admin.explain("second")
        assert explained.verdict.reason == "other_namespace"
        assert "revision 'old' instead of 'new'" in explained.verdict.details[-1]


async def test_a_damaged_object_is_told(setup, tmp_path):
    async with setup({}, {}) as both:
        await both.ask(0, "first")
        for path in objects(tmp_path):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
        await both.ask(1, "second")
        (explained,) = await both.admin.explain("second")
        assert explained.verdict.reason == "unreadable"
        assert "at r1: 1 corrupt, 0 foreign, 0 vanished objects so far" in explained.verdict.details


async def test_a_missed_deadline_is_told(setup):
    async with setup({}, {"cache": {"staging_deadline_s": 0.05}}) as both:
        await both.ask(0, "first")
        store = both.replicas[1].replica._built().cache.shared_store
        read_into = store.read_into

        def read_slowly(*arguments):
            time.sleep(0.5)
            return read_into(*arguments)

        store.read_into = read_slowly
        await both.ask(1, "second")
        assert await both.reason("second") in ("deadline", "no_turn")


def trace(missed, cached=0, staged=0, fate=None) -> RequestTrace:
    hashes = tuple(BlockHash(bytes([index]) * 32) for index in range(4))
    receipt = Receipt(33, cached * 8, 0, 0, 33 - cached * 8)
    return RequestTrace("x", "r0", "ns", 100.0, 8, hashes, receipt, 0, staged, missed, fate)


def known(fate=None, earlier=None, replica="r1") -> KnownBlock:
    return KnownBlock(replica, "ns", BlockState(False, False, fate), earlier)


@pytest.mark.parametrize(
    ("one", "others", "expected"),
    [
        (trace("cost_gate"), [], "cost_gate"),
        (trace("no_room"), [], "no_room"),
        (trace(None, staged=2), [], "engine"),
        (trace(None, cached=4, staged=4), [], "complete"),
        (trace("not_stored"), [known(Fate("stored", 50.0))], "evicted"),
        (trace("not_stored"), [known(Fate("published", 50.0))], "evicted_from_host"),
        (trace("not_stored"), [known(Fate("stored", 150.0))], "not_stored"),
        (trace("not_stored"), [known(None, "earlier one")], "dropped_save"),
        (trace("not_stored"), [known(Fate("stored", 150.0), None, "r0")], "not_stored"),
        (
            trace("not_stored", fate=Fate("dropped", 50.0)),
            [known(Fate("stored", 150.0), "a", "r0")],
            "dropped_save",
        ),
    ],
)
def test_verdicts(one, others, expected):
    found = verdict(one, others)
    assert found.reason == expected
    assert found.text == WHY[expected]


def test_fates_and_requests_are_remembered_for_a_while_only():
    fates = Fates(max_blocks=2)
    names = [BlockHash(bytes([index]) * 32) for index in range(3)]
    fates.note(names, "stored")
    assert fates.of(names[0]) is None
    assert fates.of(names[2]).kind == "stored"
    log = RequestLog(max_requests=9, max_blocks=9)  # four blocks each
    for index in range(3):
        log.add(replace(trace(None), request_id=f"id{index}"))
    assert not log.find("id0")
    assert len(log.find("id2")) == 1
    log.add(replace(trace(None), request_id="id2/1"))
    assert [one.request_id for one in log.find("id2")] == ["id2", "id2/1"]
    assert log.earlier(names[0], 200.0) == "id2/1"
    assert log.earlier(names[0], 50.0) is None


async def test_deleting_a_prompt_leaves_others(setup, tmp_path):
    other = PROMPT[::-1]
    async with setup({}, {}) as both:
        await both.ask(0, "first")
        await both.ask(0, "other", other)
        forgotten = await both.admin.forget([PROMPT], ReuseScope())
        assert forgotten.num_objects == 1
        assert forgotten.num_host_blocks == 4
        assert (await both.ask(1, "again")).cached == 0
        assert (await both.ask(1, "other again", other)).cached == 4 * BLOCK
        await both.admin.forget_all()
        assert not objects(tmp_path)


async def test_pins_last_until_they_are_ended(setup):
    async with setup({}, {}) as both:
        await both.ask(0, "first")
        assert await both.admin.pin([PROMPT], ReuseScope(), 60.0) == {"r0": 4, "r1": 4}
        shard = both.replicas[1].replica._built().cache
        filler = shard.host.reserve(shard.host.num_slots)
        assert len(filler) == shard.host.num_slots - 4, "pinned blocks stay"
        shard.host.cancel(filler)
        assert (await both.admin.pin([PROMPT], ReuseScope(), 0.0))["r1"] == 4
        filler = shard.host.reserve(shard.host.num_slots)
        assert len(filler) == shard.host.num_slots
        shard.host.cancel(filler)
        with pytest.raises(RequestError, match="30 days"):
            await both.admin.pin([PROMPT], ReuseScope(), 1e9)


async def test_a_replica_that_is_away_leaves_a_gap(setup):
    async with setup({}, {}) as both:
        await both.replicas[1].replica.close()
        assert set((await both.admin.overview())["replicas"]) == {"r0"}
        await both.replicas[0].replica.close()
        with pytest.raises(ReplicaUnavailableError, match="no replica can be asked"):
            await both.admin.overview()


ROUTES = [
    ("GET", "/v1/cache"),
    ("GET", "/v1/cache/explain?request_id=x"),
    ("DELETE", "/v1/cache"),
    ("POST", "/v1/cache/warm"),
    ("POST", "/v1/cache/pin"),
    ("POST", "/v1/cache/unpin"),
]


async def test_only_admin_keys_get_in(setup):
    issued, document = keys()
    async with routes(setup, document) as (_, client):
        for method, path in ROUTES:
            assert (await client.request(method, path)).status_code == 401
            headers = {"Authorization": f"Bearer {issued['user']}"}
            assert (await client.request(method, path, headers=headers)).status_code == 403
    async with routes(setup, None) as (_, client):  # without keys nobody is an administrator
        assert {(await client.request(*one)).status_code for one in ROUTES} == {403}


async def test_the_routes(setup):
    issued, document = keys()
    text = "What is computed once is computed for all."
    async with routes(setup, document) as (both, client):
        client.headers["Authorization"] = f"Bearer {issued['admin']}"
        body = {"prompts": text, "tenant": "user", "pin_s": 60}
        warmed = (await client.post("/v1/cache/warm", json=body)).json()
        assert warmed["prompts"][0]["computed"] == len(text)
        pinned = len(text) // BLOCK
        assert (warmed["pinned_blocks"], warmed["stored"]) == ({"r0": pinned, "r1": pinned}, True)

        scope = Access(document).tenant("user").scope(None)
        prompt = (*TokenPerByte().text(text), 7)
        request = GenerationRequest("cmpl-1", prompt, SamplingParams(2), scope)
        assert await both.replicas[0].flush(20)
        assert (await both.replicas[1].answer(request)).receipt.cached == len(text) // 8 * 8
        found = (await client.get("/v1/cache/explain", params={"request_id": "cmpl-1"})).json()
        assert found["requests"][0]["reason"] == "complete"
        assert (
            await client.get("/v1/cache/explain", params={"request_id": "x"})
        ).status_code == 404

        assert (await client.get("/v1/cache/explain")).status_code == 400

        replicas = (await client.get("/v1/cache")).json()["replicas"]
        assert replicas["r0"]["cache"]["saved_blocks"] == len(text) // BLOCK
        assert replicas["r0"]["namespace"]["layout"]["tokens_per_block"] == BLOCK

        body = {"prompts": [list(prompt)], "tenant": "user"}
        unpinned = (await client.post("/v1/cache/unpin", json=body)).json()["unpinned_blocks"]
        assert unpinned["r0"] == len(text) // BLOCK
        pinned = await client.post("/v1/cache/pin", json={**body, "ttl_s": 5})
        assert pinned.json()["pinned_blocks"]["r1"] == len(text) // BLOCK
        other = {**body, "cache_salt": "narrower"}
        assert (await client.request("DELETE", "/v1/cache", json=other)).json()["num_objects"] == 0
        deleted = (await client.request("DELETE", "/v1/cache", json=body)).json()
        assert deleted["num_objects"] >= 1
        everything = await client.request("DELETE", "/v1/cache", json={"all": True})
        assert everything.status_code == 200
        for wrong in ({}, {"all": True, **body}, {**body, "tenant": "nobody"}):
            assert (await client.request("DELETE", "/v1/cache", json=wrong)).status_code == 400
