"""Faults of the node's arena, injected into real processes: killed, stopped, damaged, replaced.

Each time: the right bytes or a miss, nobody else disturbed, and every slot accounted for.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_cache.config import HostConfig
from shared_cache.hashing import BlockHash
from shared_cache.host.folder import ArenaPaths
from shared_cache.host.interface import NewRun
from shared_cache.host.node import NodeHostTier
from shared_cache.host.record_format import (
    RECORD_BYTES,
    Geometry,
    ReservedRecord,
    SlotRecord,
    decode_record,
)
from tests.shared_cache.arenas import (
    BLOCK_BYTES,
    ROOT,
    OwnerProcess,
    RawClient,
    await_true,
    background_owners,
    bring,
    client_process,
    hashes_of,
    host_config,
    is_right,
    memory_folder,
    open_tier,
    owner_process,
    paths_of,
    payload_of,
)

HASHES = hashes_of("faults", 8)
NUM_SLOTS, STOCK = 256, 32


@pytest.fixture
def config() -> Iterator[HostConfig]:
    with memory_folder() as folder:
        yield host_config(folder)


@pytest.fixture
def owner(config: HostConfig) -> Iterator[OwnerProcess]:
    with owner_process(config) as owner:
        yield owner


@pytest.fixture
def tier(config: HostConfig, owner: OwnerProcess) -> Iterator[NodeHostTier]:
    with open_tier(config) as tier:
        yield tier


def _counts(tier: NodeHostTier) -> tuple[int, int, int]:
    """Reserved, used and leased slots; all slots are accounted for. Zeros while away."""
    stats = tier.stats()
    if not stats.is_connected:
        return 0, 0, 0
    assert stats.free_slots + stats.used_slots + stats.reserved_slots == stats.num_slots
    return stats.reserved_slots, stats.used_slots, stats.leased_slots


def _await_back(*tiers: NodeHostTier) -> None:
    for tier in tiers:
        await_true(lambda tier=tier: tier.stats().is_connected)


def _fill(tier: NodeHostTier, label: str) -> None:
    """Bring more blocks than there is room for, so that all goes that may go."""
    for part in range(8):
        tier.release(bring(tier, hashes_of(f"{label} {part}", 60)))


def _num_right(tier: NodeHostTier, hashes: list[BlockHash], slots: tuple[int, ...]) -> int:
    return sum(is_right(tier, *pair) for pair in zip(hashes, slots, strict=False))


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes((byte ^ 0x10,)))


def _record_position(slot: int) -> int:
    return Geometry(4 << 20, 2 << 20).record_offset(slot, BLOCK_BYTES // 4096)


def _read_record(paths: ArenaPaths, slot: int) -> SlotRecord | None:
    start = _record_position(slot)
    return decode_record(paths.records.read_bytes()[start : start + RECORD_BYTES], slot)


# A client dies


def test_a_killed_client_loses_what_it_held_and_nothing_else(
    config: HostConfig, tier: NodeHostTier
) -> None:
    own = bring(tier, HASHES)
    with client_process(config, "hold") as client:
        assert client.report() == {"leased": 8, "reserved": 5, "claimed": 3}
        await_true(lambda: _counts(tier)[1:] == (16, 16))
        client.process.kill()
        await_true(lambda: _counts(tier) == (STOCK, 16, 8))
    assert len(tier.claim(hashes_of("claimed 0", 3)).slots) == 3, "its claims have ended"
    assert _num_right(tier, HASHES, own.slots) == 8


def test_a_stopped_client_keeps_what_it_holds(config: HostConfig, tier: NodeHostTier) -> None:
    with client_process(config, "hold") as client:
        client.report()
        client.process.send_signal(signal.SIGSTOP)
        _fill(tier, "more")
        client.process.send_signal(signal.SIGCONT)
        assert client.finish() == {"right": 8}


def test_garbage_from_one_client_disturbs_no_other(config: HostConfig, tier: NodeHostTier) -> None:
    lease = bring(tier, HASHES)
    choose = random.Random(1)
    for _ in range(20):
        client = RawClient(config)
        client.socket.sendall(choose.randbytes(choose.randrange(1, 4000)))
        client.close()
    assert tier.lease(HASHES).slots == lease.slots


# The owner dies


def test_leases_and_reservations_outlive_the_owner(
    config: HostConfig, owner: OwnerProcess, tier: NodeHostTier
) -> None:
    lease = bring(tier, HASHES)
    slots = tier.reserve(3)
    owner.kill()
    assert _num_right(tier, HASHES, lease.slots) == 8
    assert tier.lease_held(HASHES[:2]).slots == lease.slots[:2]
    assert tier.lease(HASHES).slots == ()
    assert tier.claim(HASHES, wait_s=5.0).slots == (), "it does not wait for the dead"
    new = hashes_of("written meanwhile", 3)
    for block_hash, slot in zip(new, slots, strict=True):
        tier.buffer(slot)[:] = payload_of(block_hash)
    owner.start()
    _await_back(tier)
    with open_tier(config) as other:
        _fill(other, "other")
        assert _num_right(tier, HASHES, lease.slots) == 8, "leased slots are nobody else's"
        assert _num_right(tier, new, slots) == 3, "nor are reserved ones"
    committed = tier.commit(slots, NewRun(ROOT, tuple(new)))
    assert _num_right(tier, new, committed.slots) == 3
    assert _counts(tier)[2] == 11
    tier.release(lease)
    assert _counts(tier)[2] == 5, "the two that were leased again, and the new ones"


def test_leases_that_ended_while_the_owner_was_away_have_ended(
    owner: OwnerProcess, tier: NodeHostTier
) -> None:
    lease, other = bring(tier, HASHES), tier.lease(HASHES[:4])
    slots = tier.reserve(4)
    owner.kill()
    tier.release(lease)
    tier.cancel(slots[:2])
    assert tier.commit(slots[2:], NewRun(ROOT, tuple(hashes_of("dropped", 2)))).slots == ()
    owner.start()
    _await_back(tier)
    await_true(lambda: _counts(tier) == (STOCK, 8, 4))
    tier.release(other)
    assert _counts(tier)[2] == 0


def test_a_stopped_clients_blocks_stay_until_it_is_back(
    config: HostConfig, owner: OwnerProcess, tier: NodeHostTier
) -> None:
    with client_process(config, "hold") as client:
        client.report()
        client.process.send_signal(signal.SIGSTOP)
        owner.kill()
        owner.start()
        _await_back(tier)
        _fill(tier, "greedy")
        client.process.send_signal(signal.SIGCONT)
        assert client.finish() == {"right": 8}
        client.process.wait(10)
    await_true(lambda: _counts(tier)[::2] == (STOCK, 0))
    _fill(tier, "more")
    assert tier.lease(hashes_of("held 0", 8)).slots == (), "they may be evicted now"


@pytest.mark.parametrize("seed", [1, 2])
def test_clients_at_work_see_no_wrong_byte_when_the_owner_is_killed(
    config: HostConfig, owner: OwnerProcess, tier: NodeHostTier, seed: int
) -> None:
    choose = random.Random(seed)
    with (
        client_process(config, "churn", seed) as one,
        client_process(config, "churn", -seed) as two,
    ):
        one.report()
        two.report()
        for _ in range(3):
            time.sleep(choose.uniform(0.1, 0.4))
            owner.kill()
            time.sleep(choose.uniform(0.0, 0.1))
            owner.start()
        time.sleep(0.4)
        for client in (one, two):
            told = client.finish()
            assert told["wrong"] == 0
            assert told["brought"] > 0
            assert told["hits"] > 0
            client.process.wait(10)
    _await_back(tier)
    await_true(lambda: _counts(tier)[::2] == (STOCK, 0))


def test_owner_and_clients_killed_at_work_leave_only_whole_blocks(
    config: HostConfig, owner: OwnerProcess
) -> None:
    for round_number in range(3):
        with client_process(config, "churn", 7) as one, client_process(config, "churn", 8) as two:
            one.report()
            two.report()
            time.sleep(0.2 + 0.1 * round_number)
            owner.kill()
        owner.start()
        with open_tier(config) as tier:
            await_true(lambda tier=tier: _counts(tier)[0] == STOCK)
            num_found = 0
            for number in range(48):
                hashes = hashes_of(f"chain {number}", 8)
                lease = tier.lease(hashes)
                assert _num_right(tier, hashes, lease.slots) == len(lease.slots)
                num_found += len(lease.slots)
                tier.release(lease)
            assert num_found > 0, "whole blocks are adopted"


def test_an_owner_that_died_is_started_again_by_its_clients() -> None:
    with (
        memory_folder() as folder,
        background_owners(host_config(folder, start_owner=True)) as (config, owners),
    ):
        with open_tier(config) as tier:
            lease = bring(tier, HASHES)
            (first,) = owners()
            os.kill(first, signal.SIGKILL)
            assert _num_right(tier, HASHES, lease.slots) == 8
            _await_back(tier)
            assert tier.lease(HASHES).slots == lease.slots
            (second,) = owners() - {first}
        os.kill(second, signal.SIGTERM)
        await_true(lambda: not any(folder.iterdir()))


# The owner does not answer


def test_a_stopped_owner_costs_one_timeout_and_leaks_nothing(
    owner: OwnerProcess, tier: NodeHostTier
) -> None:
    tier.release(bring(tier, HASHES))
    slots = tier.reserve(4)
    owner.pause()
    started_s = time.monotonic()
    assert tier.claim(HASHES + hashes_of("missing", 4)).slots == ()
    assert 0.9 < time.monotonic() - started_s < 3
    started_s = time.monotonic()
    assert tier.lease(HASHES).slots == ()
    assert tier.pin(HASHES, 1.0) == 0
    assert not tier.stats().is_connected
    assert len(tier.reserve(2)) == 2, "there still is a stock"
    assert tier.commit(slots, NewRun(ROOT, tuple(hashes_of("dropped", 4)))).slots == ()
    tier.stored(HASHES, is_stored=True)
    assert time.monotonic() - started_s < 0.5, "only the first call waits"
    owner.go_on()
    _await_back(tier)
    await_true(lambda: _counts(tier) == (STOCK - 4, 8, 0))  # the late claim, the dropped commit
    assert len(tier.lease(HASHES).slots) == 8
    assert tier.num_faults >= 4


def test_a_commit_that_was_answered_too_late_leaves_no_lease(
    owner: OwnerProcess, tier: NodeHostTier
) -> None:
    slots = tier.reserve(4)
    for block_hash, slot in zip(HASHES, slots, strict=False):
        tier.buffer(slot)[:] = payload_of(block_hash)
    owner.pause()
    assert tier.commit(slots, NewRun(ROOT, tuple(HASHES[:4]))).slots == ()
    owner.go_on()
    await_true(lambda: _counts(tier)[1:] == (4, 0))
    assert _num_right(tier, HASHES, tier.lease(HASHES).slots) == 4, "the bytes were whole"


def test_closing_while_the_owner_is_stopped_does_not_hang(
    config: HostConfig, owner: OwnerProcess
) -> None:
    with open_tier(config) as tier:
        bring(tier, HASHES)
        owner.pause()
        started_s = time.monotonic()
        tier.close()
        assert time.monotonic() - started_s < 5
        owner.go_on()
    with open_tier(config) as other:
        await_true(lambda: _counts(other) == (STOCK, 8, 0))


# Damage and replacement


def test_damaged_blocks_and_records_are_not_adopted(
    config: HostConfig, owner: OwnerProcess
) -> None:
    with open_tier(config) as tier:
        lease = bring(tier, HASHES)
    owner.kill()
    paths = paths_of(config)
    _flip(paths.arena, lease.slots[3] * 4096 + 1234)
    _flip(paths.records, _record_position(lease.slots[6]) + 50)
    owner.start()
    with open_tier(config) as tier:
        await_true(lambda: _counts(tier) == (STOCK, 6, 0))
        assert tier.lease(HASHES).slots == lease.slots[:3]
        assert tier.lease(HASHES[4:]).slots == lease.slots[4:6]
        assert tier.lease(HASHES[7:]).slots == lease.slots[7:]


def test_a_leased_slot_whose_record_is_damaged_is_given_to_nobody(
    config: HostConfig, owner: OwnerProcess, tier: NodeHostTier
) -> None:
    lease = bring(tier, HASHES)
    owner.kill()
    paths = paths_of(config)
    _flip(paths.records, _record_position(lease.slots[2]) + 50)
    owner.start()
    _await_back(tier)
    assert isinstance(_read_record(paths, lease.slots[2]), ReservedRecord), "for its reader"
    with open_tier(config) as other:
        _fill(other, "other")
    assert _num_right(tier, HASHES, lease.slots) == 8
    assert tier.lease_held(HASHES).slots == lease.slots[:2], "but it is not leased again"
    owner.kill()
    owner.start()
    _await_back(tier)
    _fill(tier, "own")
    assert _num_right(tier, HASHES, lease.slots) == 8, "a second restart changes nothing"
    tier.release(lease)
    await_true(lambda: _counts(tier)[::2] == (STOCK, 2))


def test_another_arena_leaves_the_old_one_readable(
    config: HostConfig, owner: OwnerProcess, tier: NodeHostTier
) -> None:
    lease = bring(tier, HASHES)
    slots = tier.reserve(2)
    owner.kill()
    paths = paths_of(config)
    paths.arena.unlink()
    owner.start()
    _await_back(tier)
    new = bring(tier, hashes_of("new", 8))
    assert not set(new.slots) & {*lease.slots, *slots}
    assert _num_right(tier, hashes_of("new", 8), new.slots) == 8
    assert _num_right(tier, HASHES, lease.slots) == 8
    assert tier.lease(HASHES).slots == tier.lease_held(HASHES).slots == ()
    faults = tier.num_faults
    assert tier.commit(slots, NewRun(ROOT, tuple(HASHES[:2]))).slots == ()
    assert tier.num_faults == faults, "the owner was not even asked"
    await_true(lambda: _counts(tier) == (STOCK, 8, 8))
    tier.release(lease)
    assert _counts(tier) == (STOCK, 8, 8), "the new arena's owner hears nothing of it"
    with pytest.raises(ValueError, match="not one of"):
        tier.buffer(lease.slots[0])
    tier.release(new)
    assert _counts(tier)[2] == 0


def test_a_stopped_owner_in_good_order_leaves_readers_alone(
    owner: OwnerProcess, tier: NodeHostTier
) -> None:
    lease = bring(tier, HASHES)
    owner.close()
    assert _num_right(tier, HASHES, lease.slots) == 8
    owner.start()
    _await_back(tier)
    assert tier.lease(HASHES).slots == ()
    assert _num_right(tier, HASHES, lease.slots) == 8
