"""Blocks that one process leased and another one copies, though both number slots differently."""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared_cache.config import HostConfig
from shared_cache.errors import HostMemoryGoneError
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier, Place
from shared_cache.host.node import NodeHostTier
from tests.shared_cache.arenas import (
    OwnerProcess,
    await_true,
    bring,
    hashes_of,
    host_config,
    memory_folder,
    open_tier,
    owner_process,
    paths_of,
    payload_of,
    running_owner,
)
from tests.shared_cache.fakes import make_host

ODD_BYTES = 20_480
"""Blocks that do not divide an extent, so that slots are counted from each extent's beginning."""


@pytest.fixture
def config() -> Iterator[HostConfig]:
    with memory_folder() as folder:
        yield host_config(Path(folder), bytes=32 << 20)


def check(reader: HostTier, place: Place, hashes: Sequence[BlockHash]) -> None:
    buffers = reader.blocks_at(place).views()
    assert len(buffers) == len(hashes)
    for buffer, block_hash in zip(buffers, hashes, strict=True):
        assert bytes(buffer) == payload_of(block_hash, reader.block_bytes)


@pytest.mark.parametrize("block_bytes", [16_384, ODD_BYTES, 65_536])
def test_another_process_reads_what_one_has_leased(config: HostConfig, block_bytes: int) -> None:
    with running_owner(config), ExitStack() as stack:
        leader, rank, other = (
            stack.enter_context(open_tier(config, name, block_bytes=block_bytes))
            for name in ("one", "one", "two")
        )
        hashes = hashes_of("prompt", 5)
        others = bring(other, hashes_of("another", 1))  # extents of both namespaces, mixed
        lease = bring(leader, hashes)
        assert len(lease.slots) == 5
        place = leader.place(lease.slots)
        check(rank, place, hashes)
        assert max(place.slots) < rank.num_slots
        assert len(leader.place(()).slots) == 0
        assert rank.blocks_at(leader.place(())).views() == []
        leader.release(lease)
        other.release(others)


def test_neighbours_are_counted_without_gaps(config: HostConfig) -> None:
    with running_owner(config), open_tier(config, block_bytes=ODD_BYTES) as tier:
        slots = tier.claim(hashes_of("new", 40)).slots
        numbers = sorted(tier.place(slots).slots)
        assert numbers == list(range(numbers[0], numbers[0] + len(slots)))
        tier.cancel(slots)


def replace_arena(config: HostConfig, owner: OwnerProcess) -> None:
    """Another arena takes the place of this one, as when somebody clears the folder."""
    owner.kill()
    paths_of(config).arena.unlink()
    owner.start()


def brought(tier: NodeHostTier, hashes: Sequence[BlockHash]) -> HostLease:
    """A lease on blocks that are brought as soon as the tier has its owner again."""
    await_true(lambda: tier.stats().is_connected)
    lease = bring(tier, hashes)
    assert len(lease.slots) == len(hashes)
    return lease


def test_a_number_means_the_same_block_to_who_has_seen_another_arena(config: HostConfig) -> None:
    """The leader counts the second arena's slots from another base, as it leases the first one's
    still; the rank came later."""
    with owner_process(config) as owner, open_tier(config) as leader:
        old = brought(leader, hashes_of("old", 4))
        old_place = leader.place(old.slots)
        replace_arena(config, owner)
        new = brought(leader, hashes_of("new", 4))
        new_place = leader.place(new.slots)
        assert min(new.slots) > max(new_place.slots), "another base"
        assert old_place.memory != new_place.memory
        with open_tier(config) as rank:
            check(rank, new_place, hashes_of("new", 4))
            with pytest.raises(HostMemoryGoneError, match="leave the files of a running arena"):
                rank.blocks_at(old_place).views()
        check(leader, old_place, hashes_of("old", 4))
        check(leader, new_place, hashes_of("new", 4))


def test_a_rank_reads_the_arena_before_and_the_next_one_while_one_is_replaced(
    config: HostConfig,
) -> None:
    """Leases outlive the arena's files, and a rank may hear of the new arena first or last."""
    with owner_process(config) as owner, ExitStack() as stack:
        leader, rank = (stack.enter_context(open_tier(config)) for _ in "12")
        old = brought(leader, hashes_of("old", 4))
        old_place = leader.place(old.slots)
        replace_arena(config, owner)
        brought(rank, hashes_of("rank", 2))  # it has nothing of the old arena
        check(rank, old_place, hashes_of("old", 4))
        new = brought(leader, hashes_of("new", 4))
        check(rank, leader.place(new.slots), hashes_of("new", 4))


def test_a_rank_that_is_away_finds_the_new_arena_by_itself(config: HostConfig) -> None:
    with owner_process(config) as owner, ExitStack() as stack:
        leader, rank = (stack.enter_context(open_tier(config)) for _ in "12")
        rank._session._closing.set()  # it does not attach again
        old = brought(leader, hashes_of("old", 4))
        check(rank, leader.place(old.slots), hashes_of("old", 4))
        replace_arena(config, owner)
        new = brought(leader, hashes_of("new", 4))
        check(rank, leader.place(new.slots), hashes_of("new", 4))
        check(leader, leader.place(old.slots), hashes_of("old", 4))


def test_memory_that_is_read_for_the_first_time_is_prepared_for_the_next(
    config: HostConfig,
) -> None:
    with running_owner(config), ExitStack() as stack:
        leader, rank = (stack.enter_context(open_tier(config)) for _ in "12")
        shown: list[int] = []
        rank.show_memory(lambda memory: shown.append(memory.nbytes))
        held = [bring(leader, hashes_of(label, 32)) for label in range(16)]
        num_stocked = len(shown)
        for label, lease in enumerate(held):
            check(rank, leader.place(lease.slots), hashes_of(label, 32))
        await_true(lambda: len(shown) > num_stocked)


def test_a_tier_of_one_process_knows_its_own_memory_alone() -> None:
    tier = make_host()
    hashes = hashes_of("one", 3)
    lease = bring(tier, hashes)
    place = tier.place(lease.slots)
    assert place.memory == b""
    check(tier, place, hashes)
    assert len(tier.place(()).slots) == 0
    with pytest.raises(HostMemoryGoneError, match="write scope: node"):
        tier.blocks_at(Place(b"an arena", array("I", [0]))).views()
