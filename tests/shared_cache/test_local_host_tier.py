"""The tier of one process: its memory, its checksums, and threads that share it."""

import threading
import time
from dataclasses import replace

import pytest

from shared_cache.checksum import block_checksum
from shared_cache.errors import ConfigError
from shared_cache.eviction import LruPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES
from shared_cache.host.interface import HostLease, NewRun
from shared_cache.host.local import LocalHostTier
from shared_cache.host.terms import IndexRules
from tests.shared_cache.fakes import BLOCK_BYTES, WAIT_S, chain_of, make_host, payload_of

CHAIN = chain_of(6)
HASHES = tuple(CHAIN.hashes)


def run_of(start: int, stop: int) -> NewRun:
    return NewRun(CHAIN.parent_of(start), HASHES[start:stop])


def put(tier: LocalHostTier, run: NewRun) -> HostLease:
    slots = tier.reserve(len(run.hashes))
    for slot, block_hash in zip(slots, run.hashes, strict=True):
        tier.buffer(slot)[:] = payload_of(block_hash)
    return tier.commit(slots, run)


def test_buffers_are_block_sized_apart_and_aligned() -> None:
    tier = LocalHostTier(host_bytes=3 * 8192, block_bytes=5000)
    assert tier.stats().num_slots == tier.num_slots == 3
    assert tier.block_bytes == 5000
    slots = tier.reserve(3)
    for slot in slots:
        buffer = tier.buffer(slot)
        assert buffer.nbytes == 5000
        assert not buffer.readonly
        assert _address(buffer) % SLOT_ALIGNMENT_BYTES == 0
        buffer[:] = bytes([slot + 1]) * 5000
    assert [tier.buffer(slot)[4999] for slot in slots] == [slot + 1 for slot in slots]


@pytest.mark.parametrize("slot", [-2, 6, 1])
def test_what_is_no_slot_is_refused(slot: int) -> None:
    with pytest.raises(ValueError, match="not one of the 3 slots"):
        LocalHostTier(3 * 8192, 8192).buffer(slot)


def test_no_room_for_one_block_says_which_setting_to_raise() -> None:
    with pytest.raises(ConfigError, match=r"cache\.host\.bytes \(4095\).*takes 4096 bytes"):
        LocalHostTier(host_bytes=4095, block_bytes=100)


def test_memory_that_the_system_refuses_says_which_setting_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"lower cache\.host\.bytes"):
        LocalHostTier(host_bytes=1 << 62, block_bytes=4096)


def test_a_large_tier_takes_no_memory_until_it_is_used() -> None:
    before = _resident_bytes()
    tier = LocalHostTier(host_bytes=4 << 30, block_bytes=1 << 20)
    assert tier.stats().free_slots == 4096
    assert _resident_bytes() - before < 64 << 20


def test_checksums_are_those_given_or_computed_and_go_with_their_blocks() -> None:
    tier = make_host(2)
    computed = put(tier, run_of(0, 1))
    payload = memoryview(payload_of(HASHES[0]))
    assert tier.checksum(computed.slots[0]) == block_checksum(HASHES[0], payload)
    given = put(tier, replace(run_of(1, 2), checksums=(1234,)))
    assert tier.checksum(given.slots[0]) == 1234
    assert tier.commit((), NewRun(HASHES[0], ())).slots == ()
    tier.release(computed)
    tier.release(given)
    assert tier.reserve(1) == given.slots
    with pytest.raises(KeyError):
        tier.checksum(given.slots[0])


def test_a_block_that_was_here_keeps_its_slot_and_its_checksum() -> None:
    tier = make_host(6)
    first = put(tier, run_of(0, 2))
    again = put(tier, replace(run_of(0, 3), checksums=(7, 8, 9)))
    assert again.slots[:2] == first.slots
    assert tier.checksum(first.slots[0]) != 7
    assert tier.checksum(again.slots[2]) == 9
    assert (tier.stats().used_slots, tier.stats().free_slots) == (3, 3)


def test_a_lease_ends_once() -> None:
    tier = make_host(2)
    first = put(tier, run_of(0, 2))
    second = tier.lease(HASHES)
    for _ in range(2):
        tier.release(first)
    assert tier.stats().leased_slots == 2
    tier.release(second)
    assert tier.stats().leased_slots == 0
    tier.release(tier.lease(HASHES[3:]))  # an empty one


def test_a_lease_in_the_step_takes_no_duty_to_store() -> None:
    tier = make_host(4)
    lease = put(tier, run_of(0, 2))
    assert lease.to_store == (0, 1)
    tier.stored(HASHES[:2], False)
    held = tier.lease_held(HASHES)
    assert (held.slots, held.to_store) == (lease.slots, ())
    assert tier.lease(HASHES).to_store == (0, 1)


def test_quotas_hold_here_too() -> None:
    rules = IndexRules(lambda clock: LruPolicy(), {b"tenant": BLOCK_BYTES})
    tier = LocalHostTier(4 * 4096, BLOCK_BYTES, rules)
    assert len(put(tier, replace(run_of(0, 3), tenant=b"tenant")).slots) == 1
    assert tier.stats().free_slots == 3


def test_a_pin_keeps_blocks_for_a_while() -> None:
    tier = make_host(2)
    tier.release(put(tier, run_of(0, 2)))
    assert tier.pin(HASHES, ttl_s=3600) == 2
    assert tier.reserve(1) == ()


class TestClaims:
    def test_a_claim_waits_for_what_another_thread_brings(self) -> None:
        tier = make_host(8)
        tier.release(put(tier, run_of(0, 1)))
        ours = tier.claim(HASHES[:3])
        theirs = []

        def claim() -> None:
            theirs.append(tier.claim(HASHES[:5], wait_s=WAIT_S))

        thread = threading.Thread(target=claim)
        thread.start()
        lease = tier.commit(ours.slots, run_of(1, 3))
        thread.join(WAIT_S)
        assert theirs[0].lease.slots == (*ours.lease.slots, *lease.slots)
        assert (len(theirs[0].slots), theirs[0].is_coming) == (2, False)
        for held in (ours.lease, lease, theirs[0].lease):
            tier.release(held)
        assert tier.stats().leased_slots == 0

    def test_a_claimed_block_that_another_one_brings_is_not_waited_for_any_more(self) -> None:
        tier = make_host(8)
        slow = tier.claim(HASHES[:3])
        theirs = []
        thread = threading.Thread(
            target=lambda: theirs.append(tier.claim(HASHES[:3], wait_s=WAIT_S))
        )
        thread.start()
        since_s = time.monotonic()
        put(tier, run_of(0, 3))
        thread.join(2 * WAIT_S)
        assert time.monotonic() - since_s < WAIT_S / 2
        assert len(theirs[0].lease.slots) == 3
        tier.cancel(slow.slots)

    def test_a_claim_that_is_cancelled_goes_to_who_waits(self) -> None:
        tier = make_host(8)
        ours = tier.claim(HASHES[:3])
        theirs = []
        thread = threading.Thread(
            target=lambda: theirs.append(tier.claim(HASHES[:3], wait_s=WAIT_S))
        )
        thread.start()
        tier.cancel(ours.slots)
        thread.join(WAIT_S)
        assert (len(theirs[0].slots), theirs[0].is_coming) == (3, False)

    def test_waiting_ends_with_its_time(self) -> None:
        tier = make_host(8)
        tier.claim(HASHES[:3])
        claim = tier.claim(HASHES, wait_s=0.01)
        assert (claim.lease.slots, claim.slots, claim.is_coming) == ((), (), True)

    def test_duties_to_store_are_counted_from_the_first_block(self) -> None:
        tier = make_host(8, admission="second_use")
        tier.release(put(tier, run_of(0, 1)))
        ours = tier.claim(HASHES[1:3]).slots
        theirs = []
        thread = threading.Thread(
            target=lambda: theirs.append(tier.claim(HASHES[:3], wait_s=WAIT_S))
        )
        thread.start()
        tier.commit(ours, run_of(1, 3))
        thread.join(WAIT_S)
        assert theirs[0].lease.to_store == (0, 1, 2)


def test_threads_never_see_a_block_that_is_not_complete() -> None:
    """Writers fill and evict all the time; a leased block always holds what its hash says."""
    tier = LocalHostTier(host_bytes=4 * 4096, block_bytes=64)
    chains = [chain_of(1, first_token=4 * i) for i in range(8)]
    hashes: list[BlockHash] = [chain.hashes[0] for chain in chains]
    wrong: list[int] = []

    def write(offset: int) -> None:
        for turn in range(300):
            chain = chains[(turn + offset) % len(chains)]
            for slot in tier.reserve(1):
                tier.buffer(slot)[:] = chain.hashes[0] * 2
                run = NewRun(chain.parent_of(0), tuple(chain.hashes))
                tier.release(tier.commit([slot], run))

    def read() -> None:
        for turn in range(600):
            block_hash = hashes[turn % len(hashes)]
            lease = tier.lease([block_hash])
            wrong.extend(
                slot
                for slot in lease.slots
                if tier.buffer(slot) != block_hash * 2
                or tier.checksum(slot) != block_checksum(block_hash, tier.buffer(slot))
            )
            tier.release(lease)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (tier.stats().leased_slots, tier.stats().reserved_slots) == (0, 0)


def _address(buffer: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def _resident_bytes() -> int:
    import resource
    from pathlib import Path

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
