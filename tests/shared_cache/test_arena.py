"""The arena's folder, files and records: what is refused, what survives, what is never believed."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.checksum import block_checksum
from shared_cache.errors import ConfigError
from shared_cache.host import arena as arena_module
from shared_cache.host import folder as folder_module
from shared_cache.host.arena import OwnedArena, geometry_for, host_bytes_for
from shared_cache.host.folder import HeldLock, is_locked, open_folder
from shared_cache.host.mapping import MappedArena
from shared_cache.host.record_format import (
    FREE,
    RECORD_BYTES,
    STORED_OFFSET,
    DamagedRecord,
    DamagedRecordsError,
    Geometry,
    ReservedRecord,
    SlotRecord,
    UsedRecord,
    decode_extent,
    decode_namespace,
    decode_record,
    encode_extent,
    encode_namespace,
)
from shared_cache.host.terms import BlockRecord
from tests.shared_cache.arenas import (
    WAIT_S,
    await_true,
    hashes_of,
    host_config,
    memory_folder,
    paths_of,
)

MIB = 1 << 20
NAME, PARENT, OTHER = hashes_of("records", 3)
USED = UsedRecord(3, BlockRecord(NAME, PARENT, b"tenant", False), 1 << 63)
RECORDS: list[SlotRecord | None] = [
    None,
    ReservedRecord(1 << 62),
    USED,
    UsedRecord(0, BlockRecord(OTHER, NAME, b"", True), 1),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def _raw(record: SlotRecord | None, slot: int = 180) -> bytes:
    if record is None:
        return FREE
    assert not isinstance(record, DamagedRecord)
    return record.encode(slot).ljust(RECORD_BYTES, b"\0")


# The folder


def test_the_folder_is_made_for_this_user_alone(folder: Path) -> None:
    open_folder(host_config(folder / "new"))
    assert (folder / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_may_enter_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(ConfigError, match="mode 0700"):
        open_folder(host_config(folder))


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(folder_module.os, "geteuid", lambda: other)
    with pytest.raises(ConfigError, match=f"must be a folder of user {other}"):
        open_folder(host_config(folder))


def test_a_link_to_a_folder_is_refused(folder: Path) -> None:
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(ConfigError, match="must be a folder"):
        open_folder(host_config(folder / "link"))


def test_a_folder_that_cannot_be_made_names_the_setting(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache\.host\.folder"):
        open_folder(host_config(folder / "missing" / "folder"))


def test_a_path_too_long_for_a_socket_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="too long for a socket"):
        open_folder(host_config(folder / ("long" * 20)))


# Locks


def test_a_lock_is_held_once_and_ends_with_its_release(folder: Path) -> None:
    path = folder / "lock"
    assert not is_locked(path)
    lock = HeldLock.acquire(path)
    assert lock is not None
    assert is_locked(path)
    assert HeldLock.acquire(path) is None
    lock.release(remove=True)
    assert not path.exists()
    lock.release()


def test_a_lock_on_a_removed_file_is_not_in_place(folder: Path) -> None:
    lock = HeldLock.acquire(folder / "lock")
    assert lock is not None
    lock.path.unlink()
    second = HeldLock.acquire(folder / "lock")
    assert second is not None
    assert second.is_in_place()
    assert not lock.is_in_place()
    lock.release(remove=True)
    assert second.is_in_place(), "the first one removed a file that was not its own"
    second.release()


# Sizes


@given(st.integers(1, 1 << 42))
def test_an_arena_has_at_least_two_extents_of_whole_mebibytes(host_bytes: int) -> None:
    geometry = geometry_for(host_bytes)
    assert geometry.num_extents >= 2
    assert geometry.extent_bytes % (2 * MIB) == 0
    assert geometry.extent_bytes <= 256 * MIB
    assert geometry.arena_bytes == geometry.num_extents * geometry.extent_bytes
    assert geometry.arena_bytes <= max(host_bytes, 4 * MIB)
    assert geometry.arena_bytes > host_bytes - geometry.extent_bytes


@given(st.integers(1, 256 * MIB))
def test_the_advised_size_has_room_for_the_block(block_bytes: int) -> None:
    assert geometry_for(host_bytes_for(block_bytes)).extent_bytes >= block_bytes


@given(st.integers(1, 1 << 34), st.integers(1, 600))
def test_records_of_slots_are_apart(host_bytes: int, slot_units: int) -> None:
    geometry = geometry_for(host_bytes)
    slot_units = min(slot_units, geometry.extent_units)
    for extent in (0, geometry.num_extents - 1):
        first = extent * geometry.extent_units
        slots = range(first, first + geometry.extent_units - slot_units + 1, slot_units)
        offsets = [geometry.record_offset(slot, slot_units) for slot in slots]
        assert offsets == list(range(offsets[0], offsets[0] + RECORD_BYTES * len(slots), 128))
        assert offsets[0] >= geometry.first_record_offset
        assert offsets[-1] + RECORD_BYTES <= geometry.records_bytes


# Records


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_is_read_as_it_was_written(record: SlotRecord | None) -> None:
    assert decode_record(_raw(record), 180) == record


@pytest.mark.parametrize("record", RECORDS[1:])
def test_a_record_of_another_slot_is_damaged(record: SlotRecord) -> None:
    assert decode_record(_raw(record), 360) == DamagedRecord()


@pytest.mark.parametrize("record", RECORDS[1:])
def test_no_flipped_bit_makes_another_record(record: SlotRecord) -> None:
    raw = _raw(record)
    assert not isinstance(record, DamagedRecord)
    for position in range(len(record.encode(180))):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            found = decode_record(bytes(flipped), 180)
            if position == STORED_OFFSET:
                if isinstance(found, UsedRecord):  # the block is written again, at worst
                    assert isinstance(record, UsedRecord)
                    assert found.block.block_hash == record.block.block_hash
                    assert not found.block.is_stored
            else:
                assert found == DamagedRecord()


@pytest.mark.parametrize("old", RECORDS)
@pytest.mark.parametrize("new", RECORDS)
def test_a_record_cut_off_while_it_was_written_is_the_old_one_the_new_one_or_damaged(
    old: SlotRecord | None, new: SlotRecord | None
) -> None:
    before, after = _raw(old), _raw(new)
    for num_written in range(RECORD_BYTES + 1):
        found = decode_record(after[:num_written] + before[num_written:], 180)
        if isinstance(found, UsedRecord) and isinstance(old, UsedRecord) and found != new:
            assert found.block.block_hash == old.block.block_hash
            assert found.checksum == old.checksum
        else:
            assert found in (old, new, DamagedRecord())


def test_a_tenant_that_has_no_room_is_refused() -> None:
    record = UsedRecord(0, BlockRecord(NAME, PARENT, bytes(17), False), 0)
    with pytest.raises(ValueError, match="at most 16 bytes"):
        record.encode(0)


@given(st.integers(0, 255), st.integers(1, 1 << 16), st.integers(0, 63))
def test_no_flipped_bit_makes_another_extent(namespace: int, slot_units: int, bit: int) -> None:
    word = encode_extent(namespace, slot_units)
    assert decode_extent(word) == (namespace, slot_units)
    with pytest.raises(DamagedRecordsError):
        decode_extent(word ^ 1 << bit)


def test_a_namespace_cut_off_while_it_was_written_is_none() -> None:
    raw = encode_namespace("fingerprint", 737280)
    assert decode_namespace(raw) == ("fingerprint", 737280)
    for num_written in range(len(raw)):
        assert decode_namespace(raw[:num_written].ljust(128, b"\0")) is None
    with pytest.raises(ValueError, match="1 to 96 bytes"):
        encode_namespace("x" * 97, 1)


# Files


def _make_arena(folder: Path, host_bytes: int = 4 * MIB) -> OwnedArena:
    """An arena with one block, as a crashed owner leaves it."""
    arena = OwnedArena.open(open_folder(host_config(folder)), host_bytes)
    if not arena.was_found:
        arena.records.set_namespace(0, "one", 16384)
        assert arena.assign_extent(1, 0, 16384)
        payload = memoryview(NAME * 512)
        checksum = block_checksum(NAME, payload)
        arena.records.write(512, UsedRecord(0, BlockRecord(NAME, PARENT, b"", False), checksum))
    return arena


def test_an_arena_is_found_as_it_was_left(folder: Path) -> None:
    first = _make_arena(folder)
    first.records.set_stored(512)
    first.close()
    again = _make_arena(folder)
    assert again.was_found
    assert again.boot == first.boot
    assert again.records.namespaces() == [("one", 16384)]
    assert again.records.extents() == [None, (0, 16384)]
    assert list(again.records.slots_of(1)) == list(range(512, 1024, 4))
    found = again.records.read(512)
    assert isinstance(found, UsedRecord)
    assert found.block == BlockRecord(NAME, PARENT, b"", True)
    assert again.records.read(516) is None
    again.close()


def test_only_the_owners_user_may_read_the_files(folder: Path) -> None:
    _make_arena(folder).close()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("harm", ["size", "header", "extents", "cut", "other arena", "gone"])
def test_an_arena_that_does_not_fit_is_replaced(folder: Path, harm: str) -> None:
    first = _make_arena(folder)
    first.close()
    paths = paths_of(host_config(folder))
    raw = bytearray(paths.records.read_bytes())
    if harm == "header":
        raw[12] ^= 1
    elif harm == "extents":
        raw[first.geometry.extent_table_offset + 8] ^= 1
    elif harm == "cut":
        del raw[4096:]
    paths.records.write_bytes(raw)
    if harm == "other arena":
        paths.arena.rename(folder / "old")
        paths.arena.write_bytes(bytes(4 * MIB))
    elif harm == "gone":
        paths.arena.unlink()
    again = _make_arena(folder, 8 * MIB if harm == "size" else 4 * MIB)
    assert not again.was_found
    assert again.boot != first.boot
    assert again.records.extents()[1] == (0, 16384), "the helper has filled the fresh one"
    again.close()


def test_too_little_room_names_the_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(folder)
    small = os.statvfs_result((real.f_bsize, 4096, 100, 100, 100, *tuple(real)[5:10]))
    monkeypatch.setattr(arena_module.os, "statvfs", lambda _: small)
    with pytest.raises(ConfigError, match=r"cache\.host\.bytes.*0 MiB free.*--shm-size"):
        _make_arena(folder)


@pytest.mark.parametrize(
    ("groups", "place", "limit_bytes", "is_refused"),
    [
        ("0::/", "memory.max", 3 * MIB, True),
        ("0::/", "memory.max", 4 * MIB, False),
        ("0::/", "memory.max", None, False),
        ("0::/pod/box", "pod/memory.max", 3 * MIB, True),
        ("4:memory:/box\n0::/", "memory/box/memory.limit_in_bytes", 3 * MIB, True),
        ("4:cpu,memory:/out/of/sight", "memory/memory.limit_in_bytes", 3 * MIB, True),
        ("4:memory:/box\n0::/", "memory/box/memory.limit_in_bytes", 1 << 62, False),
        ("4:cpu:/", "memory.max", 3 * MIB, False),
    ],
)
def test_an_arena_beyond_the_containers_limit_is_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    place: str,
    limit_bytes: int | None,
    is_refused: bool,
) -> None:
    (tmp_path / "own").write_text(groups + "\n")
    limit = tmp_path / "groups" / place
    limit.parent.mkdir(parents=True)
    limit.write_text("max\n" if limit_bytes is None else f"{limit_bytes}\n")
    monkeypatch.setattr(arena_module, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(arena_module, "_GROUPS", tmp_path / "groups")
    if not is_refused:
        _make_arena(folder).close()
        return
    with pytest.raises(ConfigError, match=r"cache\.host\.bytes.* 4 MiB.*only 3 MiB.*raise that"):
        _make_arena(folder)


def test_memory_that_the_system_refuses_leaves_the_extent_unassigned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = _make_arena(folder)

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(arena_module.os, "posix_fallocate", refuse)
    assert not arena.assign_extent(0, 0, 16384)
    assert arena.records.extents()[0] is None
    assert arena.assign_extent(1, 0, 0), "giving an extent back takes no memory"
    arena.close()


def _taken_bytes(arena: OwnedArena) -> int:
    return os.fstat(arena._arena_fd).st_blocks * 512


def test_all_memory_can_be_taken_at_start_so_that_nobody_waits_for_it_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = _make_arena(folder, 16 * MIB)
    assert _taken_bytes(arena) < 16 * MIB
    arena.take_all_memory()
    await_true(lambda: len(arena._has_memory) == 8)
    assert _taken_bytes(arena) == 16 * MIB
    asked: list[int] = []
    monkeypatch.setattr(arena_module.os, "posix_fallocate", lambda file, *_: asked.append(file))
    assert arena.assign_extent(2, 0, 16384)
    assert asked == [arena._records_fd]
    arena.close()


def test_memory_that_is_refused_at_start_is_asked_for_when_it_is_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, take = _make_arena(folder, 16 * MIB), os.posix_fallocate

    def refuse(file: int, start: int, num_bytes: int) -> None:
        if start >= 8 * MIB:
            raise OSError(errno.ENOSPC, "no space")
        take(file, start, num_bytes)

    monkeypatch.setattr(arena_module.os, "posix_fallocate", refuse)
    arena.take_all_memory()
    assert arena._taking is not None
    arena._taking.join(WAIT_S)
    assert arena._has_memory == {0, 1, 2, 3}
    assert not arena.assign_extent(5, 0, 16384)
    monkeypatch.setattr(arena_module.os, "posix_fallocate", take)
    assert arena.assign_extent(5, 0, 16384)
    arena.close()


def test_closing_does_not_wait_until_all_memory_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, begun, files = _make_arena(folder, 16 * MIB), threading.Event(), []

    def slow(file: int, *_: int) -> None:
        begun.set()
        time.sleep(0.1)
        os.fstat(file)  # it is open still
        files.append(file)

    monkeypatch.setattr(arena_module.os, "posix_fallocate", slow)
    arena.take_all_memory()
    assert begun.wait(WAIT_S)
    arena.close()
    assert 1 <= len(files) < 7


def test_an_extent_cut_anew_forgets_its_old_records(folder: Path) -> None:
    arena = _make_arena(folder)
    assert arena.assign_extent(1, 0, 0)
    assert arena.assign_extent(1, 1, 8192)
    assert all(arena.records.read(slot) is None for slot in arena.records.slots_of(1))
    assert arena.records.is_slot(514)
    assert not arena.records.is_slot(515)
    assert not arena.records.is_slot(0)
    assert not arena.records.is_slot(1 << 40)
    assert not arena.records.is_slot(-2)
    arena.close()


# Mappings


def test_a_mapping_reads_the_checksum_that_the_owner_wrote(folder: Path) -> None:
    arena = _make_arena(folder)
    mapped = MappedArena.open(paths_of(host_config(folder)), arena.boot, 16384)
    mapped.buffer(512)[:] = NAME * 512
    assert mapped.checksum(512) == block_checksum(NAME, mapped.buffer(512))
    for slot in (-1, mapped.end):
        with pytest.raises(ValueError, match="not one of the host tier's"):
            mapped.buffer(slot)
    arena.close()


def test_an_arena_that_was_replaced_is_not_mapped(folder: Path) -> None:
    arena = _make_arena(folder)
    with pytest.raises(FileNotFoundError):
        MappedArena.open(paths_of(host_config(folder)), bytes(16), 16384)
    arena.close()


def test_slots_of_two_arenas_have_different_numbers(folder: Path) -> None:
    paths = paths_of(host_config(folder))
    arenas: list[MappedArena] = []
    for num_extents in (2, 4, 2, 3):
        owned = OwnedArena.open(open_folder(host_config(folder)), num_extents * 2 * MIB)
        arenas.append(MappedArena.open(paths, owned.boot, 16384, arenas))
        owned.close()
        owned.remove()
    spans = sorted((arena.base, arena.end) for arena in arenas)
    assert all(end <= base for (_, end), (base, _) in pairwise(spans))
    owned = OwnedArena.open(open_folder(host_config(folder)), 4 * MIB)
    again = MappedArena.open(paths, owned.boot, 16384, [arenas[1], arenas[3]])
    assert again.base == 0, "numbers of an arena that nobody uses are used again"
    owned.close()


def test_geometry_of_a_small_arena() -> None:
    assert geometry_for(1) == Geometry(4 * MIB, 2 * MIB)
    assert geometry_for(1 << 30) == Geometry(1 << 30, 64 * MIB)
