import threading

import pytest

from shared_cache.errors import ConfigError
from shared_cache.host.local import SLOT_ALIGNMENT_BYTES, LocalHostTier
from tests.shared_cache.fakes import chain_of


def test_buffers_are_block_sized_apart_and_aligned() -> None:
    tier = LocalHostTier(host_bytes=3 * 8192, block_bytes=5000)
    assert tier.stats().num_slots == 3
    slots = tier.reserve(3)
    for slot in slots:
        buffer = tier.buffer(slot)
        assert buffer.nbytes == 5000
        assert not buffer.readonly
        assert _address(buffer) % SLOT_ALIGNMENT_BYTES == 0
        buffer[:] = bytes([slot + 1]) * 5000
    assert [tier.buffer(slot)[4999] for slot in slots] == [slot + 1 for slot in slots]


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_out_of_range_is_refused(slot: int) -> None:
    with pytest.raises(ValueError, match="not one of the 3 slots"):
        LocalHostTier(3 * 4096, 4096).buffer(slot)


def test_no_room_for_one_block_says_which_setting_to_raise() -> None:
    with pytest.raises(ConfigError, match=r"cache\.host_bytes \(4095\).*takes 4096 bytes"):
        LocalHostTier(host_bytes=4095, block_bytes=100)


def test_memory_that_the_system_refuses_says_which_setting_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"lower cache\.host_bytes"):
        LocalHostTier(host_bytes=1 << 62, block_bytes=4096)


def test_a_large_tier_takes_no_memory_until_it_is_used() -> None:
    before = _resident_bytes()
    tier = LocalHostTier(host_bytes=4 << 30, block_bytes=1 << 20)
    assert tier.stats().free_slots == 4096
    assert _resident_bytes() - before < 64 << 20


def test_threads_never_see_a_block_that_is_not_complete() -> None:
    """Writers fill and evict all the time; a leased block always holds what its hash says."""
    tier = LocalHostTier(host_bytes=4 * 4096, block_bytes=64)
    hashes = [chain_of(1, first_token=4 * i).hashes[0] for i in range(8)]
    wrong: list[int] = []

    def write(offset: int) -> None:
        for turn in range(300):
            block_hash = hashes[(turn + offset) % len(hashes)]
            for slot in tier.reserve(1):
                tier.buffer(slot)[:] = block_hash * 2
                tier.release(tier.commit([slot], [block_hash]))

    def read() -> None:
        for turn in range(600):
            lease = tier.lease([hashes[turn % len(hashes)]])
            wrong.extend(s for s in lease.slots if tier.buffer(s) != hashes[turn % 8] * 2)
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
