"""Canaries between real replicas on a tiny model: what shares is told from what does not, and why.

The replicas share no memory here (`scope: process`), so everything goes through the store.
"""

import errno
import shutil
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from actors.canary import canary_request, try_pairs
from actors.canary_replica import differences, engine_facts
from shared_cache.errors import StoreReadOnlyError
from shared_cache.media.local_medium import LocalMedium
from tests.fakes import FakeCache, FakeEngine
from tests.tiny_model import make_tiny_model, tiny_source
from tests.tiny_replicas import tiny_replica


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_source(make_tiny_model(tmp_path_factory.mktemp("canary")))


@pytest.fixture
def setup(model, tmp_path):
    """Makes replicas on one store; keyword arguments change one of them."""

    @asynccontextmanager
    async def make(*changes):
        async with AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(
                    tiny_replica(f"r{index}", model, tmp_path, **change)
                )
                for index, change in enumerate(changes)
            ]

    return make


def objects(folder) -> list:
    return list((folder / "store").rglob("*.arrow"))


async def test_replicas_that_share_pass_and_nothing_of_the_canaries_stays(setup, tmp_path):
    async with setup({}, {}, {}) as replicas:
        report = await try_pairs(replicas)
        assert [one.finding.state for one in report.pairs] == ["ok"] * 6, report.findings
        pairs = {(one.writer, one.reader) for one in report.pairs}
        assert len(pairs) == 6
        assert all("24 tokens from the store" in one.finding.text for one in report.pairs)
        assert not report.failures
        assert all(one.state == "ok" for one in report.stores)
        assert not objects(tmp_path)


async def test_the_doctor_finds_another_tokens_per_block(setup):
    async with setup({}, {"block": 16}) as replicas:
        report = await try_pairs(replicas)
    assert {one.kind for one in report.pairs} == {"tokens_per_block"}
    assert "tokens_per_block is 8 at r0 and 16 at r1" in report.pairs[0].finding.text
    assert len(report.failures) == 2


async def test_the_doctor_finds_a_different_salt(setup):
    async with setup({}, {"salts": "other"}) as replicas:
        report = await try_pairs(replicas)
    assert {one.kind for one in report.pairs} == {"cache_salt"}
    assert "r0 and r1 store the same request under different salts" in report.failures[0].text


async def test_the_doctor_finds_an_unreachable_store(setup, tmp_path):
    async with setup({}, {}) as replicas:
        shutil.rmtree(tmp_path / "store")
        (tmp_path / "store").write_text("in the way")
        report = await try_pairs(replicas)
        (tmp_path / "store").unlink()
    assert {one.kind for one in report.pairs} == {"unreachable"}
    assert all("unreachable store" in one.text for one in report.failures)
    assert len(report.failures) == 4, "two stores, two pairs"


async def test_the_doctor_finds_a_read_only_store(setup, monkeypatch):
    async with setup({}) as (writer,):

        def refuse(*_):
            raise StoreReadOnlyError("no rights")

        monkeypatch.setattr("shared_cache.stores.fs_store.try_to_write", refuse)
        async with setup({}) as (reader,):
            reader.name = "r1"
            report = await try_pairs([writer, reader])
    found = {(one.writer, one.reader): one for one in report.pairs}
    assert found["r0", "r1"].finding.state == "ok", "what may be read is read"
    assert found["r1", "r0"].kind == "read_only"
    assert "read-only store" in found["r1", "r0"].finding.text
    assert [one.state for one in report.stores] == ["ok", "warn"]


async def test_the_doctor_finds_a_store_that_became_read_only(setup, monkeypatch):
    async with setup({}, {}) as replicas:

        def refuse(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(LocalMedium, "publish", refuse)
        report = await try_pairs(replicas)
    assert {one.kind for one in report.pairs} == {"read_only"}
    assert all("Read-only file system" in one.text for one in report.failures)


async def test_the_doctor_finds_different_stores(setup):
    async with setup({}, {"store": "elsewhere"}) as replicas:
        report = await try_pairs(replicas)
    assert {one.kind for one in report.pairs} == {"lacks_block"}
    assert "is it the same place for both?" in report.failures[0].text


async def test_a_replica_without_a_cache_is_named(setup):
    async with setup({}, {"cache": {"store": None}}) as replicas:
        report = await try_pairs(replicas)
    assert {one.kind for one in report.pairs} == {"no_cache"}
    assert "r1 has no shared cache" in report.failures[0].text


async def test_wrong_tokens_are_a_failure(setup):
    async with setup({}, {}) as replicas:
        honest = replicas[1].answer

        async def lies(request):
            answer = await honest(request)
            return replace(answer, tokens=(0,))

        replicas[1].answer = lies
        report = await try_pairs(replicas)
    kinds = {(one.writer, one.kind) for one in report.pairs}
    assert ("r0", "tokens") in kinds
    assert "other tokens" in report.failures[0].text


async def test_a_replica_that_is_away_does_not_end_the_round(setup):
    async with setup({}, {}) as replicas:
        await replicas[1].replica.close()
        report = await try_pairs(replicas)
    assert [one.name for one in report.failures] == ["r1"]
    assert not report.pairs


def test_every_field_of_a_namespace_that_differs_is_named():
    engine = FakeEngine(cache=FakeCache())
    facts = engine_facts("a", engine)
    other = replace(facts.namespace, revision="1", tp_size=2)
    found = differences(facts, replace(facts, replica="b", namespace=other))
    assert found == [
        ("revision", "revision is '0' at a and '1' at b"),
        ("tp_size", "tp_size is 1 at a and 2 at b"),
    ]
    assert not differences(facts, replace(facts, replica="b"))


def test_canaries_have_nothing_in_common():
    first, second = canary_request(9), canary_request(9)
    assert first.prompt_token_ids == second.prompt_token_ids
    assert first.scope != second.scope
    assert first.request_id != second.request_id


async def test_blocks_that_no_request_can_hold_are_named(setup):
    async with setup({"block": 64, "pool_tokens": 64}, {}) as replicas:
        report = await try_pairs(replicas)
    assert all("no request can hold a whole block" in one.text for one in report.failures)
