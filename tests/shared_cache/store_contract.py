"""What every `BlockStore` must do: a test class to inherit, and helpers around it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shared_cache.checksum import block_checksum
from shared_cache.hashing import BlockHash
from shared_cache.stores.store import BlockRun, BlockStore
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, payload_of, run_of


def read_all(store: BlockStore, hashes: Sequence[BlockHash]) -> list[bytes]:
    """The leading blocks that `read_into` finds, through a pool that is filled back to front."""
    pool = bytearray(b"\xee" * (len(hashes) * BLOCK_BYTES))
    slots = [memoryview(pool)[i : i + BLOCK_BYTES] for i in range(0, len(pool), BLOCK_BYTES)][::-1]
    checksums = store.read_into(hashes, slots)
    assert len(checksums) <= len(hashes)
    good = slots[: len(checksums)]
    assert checksums == tuple(map(block_checksum, hashes, good))
    return [bytes(slot) for slot in good]


def payloads_of(hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_of(h) for h in hashes]


class BlockStoreContract:
    """Inherit, and give a fixture `store`: an empty, writable store of `NAMESPACE`."""

    def test_an_empty_store_has_nothing(self, store: BlockStore) -> None:
        hashes = chain_of(3).hashes
        assert store.match(hashes) == 0
        assert read_all(store, hashes) == []
        assert list(store.entries()) == []
        assert store.match([]) == 0
        assert store.read_into([], []) == ()
        assert store.refresh() == 0

    def test_what_was_written_is_matched_and_read(self, store: BlockStore) -> None:
        chain = chain_of(5)
        assert store.write(run_of(chain)) == 5
        assert store.match(chain.hashes) == 5
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)

    def test_checksums_may_come_with_the_run(self, store: BlockStore) -> None:
        run = run_of(chain_of(5))
        checksums = tuple(map(block_checksum, run.hashes, run.payloads))
        assert store.write(replace(run, checksums=checksums)) == 5
        assert read_all(store, run.hashes) == payloads_of(run.hashes)

    def test_refresh_knows_every_block(self, store: BlockStore) -> None:
        for chain in (chain_of(3), chain_of(2, first_token=50)):
            store.write(run_of(chain))
        assert store.refresh() == 5

    def test_only_the_common_prefix_counts(self, store: BlockStore) -> None:
        chain = chain_of(4)
        store.write(run_of(chain))
        longer, other = chain_of(6).hashes, chain_of(4, first_token=1).hashes
        assert store.match(longer) == 4
        assert read_all(store, longer) == payloads_of(chain.hashes)
        assert store.match([*chain.hashes[:2], *other[2:]]) == 2
        assert read_all(store, [*chain.hashes[:2], *other[2:]]) == payloads_of(chain.hashes[:2])
        assert store.match(other) == 0

    def test_a_second_write_changes_nothing(self, store: BlockStore) -> None:
        run = run_of(chain_of(3))
        store.write(run)
        forged = BlockRun(run.parent, run.hashes, (memoryview(bytes(BLOCK_BYTES)),) * 3)
        assert store.write(forged) == 0
        assert read_all(store, run.hashes) == payloads_of(run.hashes)

    def test_only_missing_blocks_are_written(self, store: BlockStore) -> None:
        long = chain_of(7)
        store.write(run_of(chain_of(4)))
        assert store.write(run_of(long)) == 3
        assert store.match(long.hashes) == 7
        assert read_all(store, long.hashes) == payloads_of(long.hashes)

    def test_an_empty_run_writes_nothing(self, store: BlockStore) -> None:
        assert store.write(run_of(chain_of(0))) == 0
        assert list(store.entries()) == []

    def test_a_run_may_begin_inside_a_chain(self, store: BlockStore) -> None:
        chain = chain_of(6)
        assert store.write(run_of(chain).tail(2)) == 4
        assert store.match(chain.hashes) == 0
        assert store.write(run_of(chain_of(2))) == 2
        assert store.match(chain.hashes) == 6
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)

    def test_inner_blocks_of_a_matched_run_can_be_read_alone(self, store: BlockStore) -> None:
        hashes = chain_of(6).hashes
        store.write(run_of(chain_of(6)))
        store.match(hashes)
        assert read_all(store, hashes[2:5]) == payloads_of(hashes[2:5])

    def test_the_writer_may_reuse_its_buffers(self, store: BlockStore) -> None:
        chain = chain_of(2)
        buffers = [bytearray(payload_of(h)) for h in chain.hashes]
        views = tuple(memoryview(buffer) for buffer in buffers)
        store.write(BlockRun(chain.parent_of(0), tuple(chain.hashes), views))
        for buffer in buffers:
            buffer[:] = bytes(BLOCK_BYTES)
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)

    def test_a_long_run(self, store: BlockStore) -> None:
        chain = chain_of(700)
        assert store.write(run_of(chain)) == 700
        assert store.match(chain.hashes) == 700
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)

    def test_entries_tell_every_block_with_its_parent(self, store: BlockStore) -> None:
        chains = chain_of(3), chain_of(2, first_token=50)
        for chain in chains:
            store.write(run_of(chain))
        told = {
            block_hash: parent
            for entry in store.entries()
            for parent, block_hash in zip(
                (entry.parent, *entry.hashes[:-1]), entry.hashes, strict=True
            )
        }
        assert told == {
            h: chain.parent_of(i) for chain in chains for i, h in enumerate(chain.hashes)
        }
        assert all(entry.num_bytes >= BLOCK_BYTES for entry in store.entries())

    def test_deleted_entries_are_gone(self, store: BlockStore) -> None:
        kept, dropped = chain_of(3), chain_of(3, first_token=50)
        for chain in (kept, dropped):
            store.write(run_of(chain))
        names = [e.name for e in store.entries() if set(e.hashes) <= set(dropped.hashes)]
        for name in (*names, names[0]):  # the second time there is nothing to delete
            store.delete(name)
        assert store.match(dropped.hashes) == 0
        assert read_all(store, dropped.hashes) == []
        assert read_all(store, kept.hashes) == payloads_of(kept.hashes)
        assert store.write(run_of(dropped)) == 3

    @pytest.mark.parametrize(
        "buffers",
        [
            [],
            [memoryview(bytearray(BLOCK_BYTES - 1))],
            [memoryview(bytes(BLOCK_BYTES))],
            [memoryview(bytearray(2 * BLOCK_BYTES))[::2]],
        ],
        ids=["missing", "short", "read-only", "not contiguous"],
    )
    def test_a_buffer_that_cannot_take_a_block_is_refused(
        self, store: BlockStore, buffers: list[memoryview]
    ) -> None:
        with pytest.raises(ValueError, match="buffer"):
            store.read_into(chain_of(1).hashes, buffers)

    def test_a_payload_of_a_wrong_size_is_refused(self, store: BlockStore) -> None:
        run = run_of(chain_of(1))
        with pytest.raises(ValueError, match="63 bytes"):
            store.write(BlockRun(run.parent, run.hashes, (memoryview(bytes(63)),)))
        assert store.match(run.hashes) == 0

    def test_it_says_its_namespace_and_that_it_can_be_written(self, store: BlockStore) -> None:
        assert store.namespace == NAMESPACE
        assert not store.read_only
