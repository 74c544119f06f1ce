"""Owners of the arena as Ray's actors: they come back, take over, try again, and leave nothing."""

import os
import time

import pytest
import ray
from ray.exceptions import RayError

from actors.routing.index import routing_keys
from cluster import arena_owners
from cluster.arena_owners import ArenaOwners
from cluster.clients import RAY_NAMESPACE
from cluster.config import ClusterConfig
from shared_cache.errors import ConfigError
from shared_cache.host.interface import NewRun
from tests.shared_cache.arenas import (
    ROOT,
    ClientProcess,
    hashes_of,
    host_config,
    is_right,
    memory_folder,
    open_tier,
    owner_process,
    payload_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

WAIT_S = 30.0


@pytest.fixture
def folder():
    with memory_folder() as folder:
        yield folder


def settings(folder, **host) -> ClusterConfig:
    name = folder.name.replace("_", "-").lower().strip("-")
    wanted = host_config(folder, name="arena", **host).model_dump(mode="json")
    return ClusterConfig(model="fake", name=name, cache={"host": wanted})


@pytest.fixture
def start(folder):
    """Makes the owners of a cluster and starts them, without waiting; ends them afterwards."""
    started = []

    def start(**host):
        owners = ArenaOwners(settings(folder, **host))
        started.append(owners)
        owners.ensure()
        return owners

    yield start
    for owners in started:
        owners.stop()


def actor_of(owners: ArenaOwners):
    (name,) = owners.names
    return ray.get_actor(name, namespace=RAY_NAMESPACE)


def pid_of(actor) -> int:
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=WAIT_S)


def eventually(condition):
    deadline_s = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "did not come true in time"
        time.sleep(0.05)
    return value


def serves(owners: ArenaOwners) -> bool:
    try:
        ray.get(actor_of(owners).ready.remote(), timeout=WAIT_S)
    except (RayError, ConfigError):
        return False
    return True


def bring(tier, hashes) -> None:
    claim = tier.claim(hashes)
    for block_hash, slot in zip(hashes, claim.slots, strict=True):
        tier.buffer(slot)[:] = payload_of(block_hash)
    tier.release(tier.commit(claim.slots, NewRun(ROOT, tuple(hashes))))


def num_right(tier, hashes) -> int:
    lease = tier.lease(hashes)
    right = sum(is_right(tier, *pair) for pair in zip(hashes, lease.slots, strict=False))
    tier.release(lease)
    return right


def test_an_owner_that_is_killed_comes_back_with_the_blocks_brought_before(start, folder):
    owners, hashes = start(), hashes_of("kept", 8)
    owners.await_ready(WAIT_S)
    with open_tier(host_config(folder, name="arena")) as tier:
        bring(tier, hashes)
        before = pid_of(actor_of(owners))
        os.kill(before, 9)
        eventually(lambda: num_right(tier, hashes) == 8)
    assert pid_of(actor_of(owners)) != before
    owners.ensure()
    assert len(owners.names) == 1


def told(owners, tier_changes=()):
    """What the owner tells to who has read `tier_changes`, by tier."""
    read = {one.tier: one.end for one in tier_changes}
    actor = actor_of(owners)
    return ray.get(actor.cache_changes.remote(read), timeout=WAIT_S)


def test_an_owner_tells_what_its_arena_got_and_lost_and_all_of_it_after_a_restart(start, folder):
    owners, hashes = start(), hashes_of("told", 8)
    owners.await_ready(WAIT_S)
    keys = list(routing_keys(hashes))
    with open_tier(host_config(folder, name="arena")) as tier:
        first = told(owners)
        assert [(one.tier, one.is_snapshot, len(one.stored)) for one in first] == [
            ("host", True, 0),
            ("shared", True, 0),
        ]
        bring(tier, hashes)
        tier.stored(hashes[:2], True)
        tier.drop(hashes[6:])
        host, shared = eventually(
            lambda: changes if len((changes := told(owners, first))[1].stored) == 2 else None
        )
        assert (set(host.stored), set(host.removed)) == (set(keys[:6]), set(keys[6:]))
        assert (set(shared.stored), set(shared.removed)) == (set(keys[:2]), set())
        assert not any(one.stored or one.removed for one in told(owners, (host, shared)))
        os.kill(pid_of(actor_of(owners)), 9)
        eventually(lambda: num_right(tier, hashes) == 6)
        host, shared = told(owners, (host, shared))
        assert host.is_snapshot
        assert (set(host.stored), set(shared.stored)) == (set(keys[:6]), set(keys[:2]))


def test_a_killed_client_takes_nothing_from_another_one(start, folder):
    start().await_ready(WAIT_S)
    config, hashes = host_config(folder, name="arena"), hashes_of("ours", 6)
    with open_tier(config) as tier:
        bring(tier, hashes)
        lease = tier.lease(hashes)
        victim = ClientProcess(config, "hold")
        try:
            assert victim.report()["leased"] == 8
        finally:
            victim.close()  # kill -9
        eventually(lambda: tier.stats().leased_slots == 6)
        assert num_right(tier, hashes) == 6
        assert all(is_right(tier, *pair) for pair in zip(hashes, lease.slots, strict=True))
        assert num_right(tier, hashes_of("held 0", 8)) == 8, "what it brought is everybody's"
        tier.release(lease)


def test_an_owner_outside_of_ray_serves_until_it_ends(start, folder):
    config = host_config(folder, name="arena")
    with owner_process(config) as outside:
        owners = start()
        owners.await_ready(WAIT_S)
        with open_tier(config) as tier:
            bring(tier, hashes_of("early", 4))
            outside.kill()
            eventually(lambda: num_right(tier, hashes_of("early", 4)) == 4)
        assert serves(owners)


def test_an_owner_that_could_not_start_is_tried_again(start, folder, caplog):
    folder.chmod(0o755)  # refused: others could read the prompts
    owners = start()
    with pytest.raises(ConfigError, match="mode 0700"):
        owners.await_ready(WAIT_S)
    eventually(lambda: owners.ensure() or "does not serve" in caplog.text)
    folder.chmod(0o700)
    eventually(lambda: serves(owners))
    eventually(lambda: owners.ensure() or "serves again" in caplog.text)


def test_an_actor_that_ray_has_given_up_is_started_anew(start, monkeypatch):
    monkeypatch.setattr(arena_owners, "START_PAUSE_S", 0.1)
    owners = start()
    owners.await_ready(WAIT_S)
    before = pid_of(actor_of(owners))
    ray.kill(actor_of(owners), no_restart=True)
    eventually(lambda: owners.ensure() or (owners.names and new_pid(owners) not in (None, before)))


def new_pid(owners: ArenaOwners) -> int | None:
    try:
        return pid_of(actor_of(owners))
    except (RayError, ValueError):
        return None


def test_a_machine_without_an_arena_does_not_keep_the_others_from_starting(start, folder):
    owners = start()
    owners.await_ready(WAIT_S)
    (machine,) = owners._actors
    refused = ray.remote(Refusing).remote()
    owners._actors["small"], owners._calls["small"] = refused, refused.ready.remote()
    owners._calls[machine] = owners._actors[machine].ready.remote()
    owners.await_ready(WAIT_S)
    del owners._calls[machine], owners._actors[machine]
    with pytest.raises(ConfigError, match="64 MiB"):
        owners.await_ready(WAIT_S)


class Refusing:
    def ready(self):
        raise ConfigError("there are only 64 MiB")

    def stop(self):
        pass


def test_stop_leaves_nothing_in_the_folder(start, folder):
    owners = start()
    owners.await_ready(WAIT_S)
    with open_tier(host_config(folder, name="arena")) as tier:
        bring(tier, hashes_of("gone", 4))
    assert list(folder.iterdir())
    owners.stop()
    assert list(folder.iterdir()) == []
    assert owners.names == set()
