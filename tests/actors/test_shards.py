"""Several routers: every ingress names the same one, and one more moves only its share."""

import pytest

from actors.routing.shards import router_name, shard_of

TENANTS = [f"tenant-{number}" for number in range(2000)]


def test_everybody_comes_to_the_same_answer():
    assert [shard_of(one, "model", 4) for one in (None, "", "a", "b")] == [2, 0, 3, 2]
    assert shard_of("a", "model", 1) == 0
    with pytest.raises(ValueError, match="at least 1"):
        shard_of("a", "model", 0)


def test_one_router_more_takes_its_share_and_moves_nothing_else():
    before = [shard_of(one, "m", 4) for one in TENANTS]
    after = [shard_of(one, "m", 5) for one in TENANTS]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {4}
    assert 300 < len(moved) < 500
    assert all(400 < before.count(shard) < 600 for shard in range(4))


def test_a_tenant_may_be_with_another_router_for_another_model():
    assert {shard_of("a", f"model-{number}", 8) for number in range(50)} == set(range(8))


def test_the_first_router_has_the_name_that_a_single_one_has():
    assert [router_name("c", shard) for shard in (0, 1)] == ["c-router", "c-router-1"]
