"""Host blocks that begin in the middle of a prompt, behind those on the device, are loaded."""

import pytest

from shared_cache.host.interface import NewRun
from tests.shared_cache.fakes import BLOCK_BYTES, chain_of, make_cache, num_in_host
from tests.shared_cache.mini_engine import SIZE, MiniEngine, MiniRequest, block_kv

TOKENS = list(range(6 * SIZE + 1))


@pytest.mark.parametrize(
    ("num_on_device", "in_host", "num_loaded"),
    [
        (2, range(2, 6), 4),
        (2, range(2, 4), 2),
        (2, range(0, 6), 4),
        (2, range(3, 6), 0),  # a gap between device and host
        (0, range(2, 6), 0),
        (6, range(0, 0), 0),
    ],
)
def test_what_follows_the_devices_blocks_is_loaded_whatever_came_before(
    num_on_device: int, in_host: range, num_loaded: int
) -> None:
    """The engine itself checks that everything it attends to is right."""
    cache = make_cache(None)
    hashes = chain_of(6).hashes
    slots = cache.host.reserve(len(in_host))
    for slot, block in zip(slots, in_host, strict=True):
        kv = block_kv(TOKENS, block)
        assert len(kv) == BLOCK_BYTES
        cache.host.buffer(slot)[:] = kv
    if slots:
        run = NewRun(hashes[in_host.start - 1], tuple(hashes[block] for block in in_host))
        cache.host.release(cache.host.commit(slots, run))
    engine = MiniEngine(cache)
    request = MiniRequest(1, list(TOKENS))
    assert engine.run(request, 2, num_on_device * SIZE) == num_loaded * SIZE
    assert engine.scheduler.connector_faults == 0
    assert num_in_host(cache, hashes[num_on_device:]) == 6 - num_on_device, (
        "computed blocks are saved"
    )
    assert cache.stats().host.leased_slots == 0
    cache.close()
