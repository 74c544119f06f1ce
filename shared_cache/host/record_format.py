"""The bytes of an arena's records: what lies in which slot, so that no death of the owner can lie.

The owner may die between any two bytes that it writes. So a record carries its own checksum, and
everything that changes alone fits one store of the processor: the flag `stored` is outside of that
checksum, an entry of the extent table is one 64-bit word. A record that is neither whole nor empty
says nothing about its slot, not even that the slot is free; a table that is neither is a reason to
begin with a fresh arena.
"""

import struct
from dataclasses import dataclass

import xxhash

from shared_cache.hashing import HASH_BYTES, BlockHash
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES
from shared_cache.host.terms import BlockRecord

FORMAT_VERSION = 1
RECORD_BYTES = 128
NAMESPACE_BYTES = 128
MAX_NAMESPACES = 256
MAX_FINGERPRINT_BYTES = 96
MAX_TENANT_BYTES = 16
STORED_OFFSET = 1
PAYLOAD_CHECKSUM_OFFSET = 16
STORED = 0x5A
"""Marks a block that the shared tier has; a value that one flipped bit does not make."""

_MAGIC = b"kvarena\0"
_HEADER = struct.Struct("<8sIQQ16sQ")
_NAMESPACE = struct.Struct(f"<H{MAX_FINGERPRINT_BYTES}sQ")
_RECORD = struct.Struct(f"<BBBxIQQ{MAX_TENANT_BYTES}s{HASH_BYTES}s{HASH_BYTES}s")
_CHECKSUM = struct.Struct("<Q")
_NUMBER = struct.Struct("<I")
_NAME_OFFSET = _RECORD.size - 2 * HASH_BYTES
_RESERVED, _USED = 1, 2

HEADER_BYTES = _HEADER.size + _CHECKSUM.size
FIRST_NAMESPACE_OFFSET = 4096
FREE = bytes(RECORD_BYTES)
"""The record of a slot that holds nothing."""


class DamagedRecordsError(Exception):
    """The header or a table is not what an owner wrote; the arena is not to be used again."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an arena is cut. A slot is the number of its first 4096 bytes in the arena."""

    arena_bytes: int
    extent_bytes: int

    @property
    def num_extents(self) -> int:
        """Extents of the arena."""
        return self.arena_bytes // self.extent_bytes

    @property
    def extent_units(self) -> int:
        """Slot numbers of one extent; those inside a slot name none."""
        return self.extent_bytes // SLOT_ALIGNMENT_BYTES

    @property
    def num_units(self) -> int:
        """Slot numbers of the arena."""
        return self.num_extents * self.extent_units

    @property
    def extent_table_offset(self) -> int:
        """Where the extent table begins in the records."""
        return FIRST_NAMESPACE_OFFSET + MAX_NAMESPACES * NAMESPACE_BYTES

    @property
    def first_record_offset(self) -> int:
        """Where the records of the first extent begin."""
        end = self.extent_table_offset + 8 * self.num_extents
        return -(-end // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES

    @property
    def records_bytes(self) -> int:
        """Size of the file of records; most of it is never written and takes no memory."""
        return self.first_record_offset + self.num_units * RECORD_BYTES

    def record_offset(self, slot: int, slot_units: int) -> int:
        """Where the record of a slot lies, in an extent of slots of `slot_units`."""
        extent, inside = divmod(slot, self.extent_units)
        index = extent * self.extent_units + inside // slot_units
        return self.first_record_offset + index * RECORD_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """What a file of records says of its arena; `boot` is another one for every fresh arena."""

    geometry: Geometry
    boot: bytes
    arena_inode: int

    def encode(self) -> bytes:
        """`HEADER_BYTES` bytes."""
        body = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            self.geometry.arena_bytes,
            self.geometry.extent_bytes,
            self.boot,
            self.arena_inode,
        )
        return _sealed(body, 0)

    @classmethod
    def decode(cls, raw: bytes) -> "Header":
        """The inverse of `encode`; raises `DamagedRecordsError` for anything else."""
        if len(raw) < HEADER_BYTES or not _is_whole(raw, _HEADER.size, 0):
            raise DamagedRecordsError("the header is damaged or cut short")
        magic, version, arena_bytes, extent_bytes, boot, inode = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != FORMAT_VERSION:
            raise DamagedRecordsError(f"of version {version}, not {FORMAT_VERSION}")
        return cls(Geometry(arena_bytes, extent_bytes), boot, inode)


@dataclass(frozen=True, slots=True)
class ReservedRecord:
    """The slot is being written by `holder`."""

    holder: int

    def encode(self, slot: int) -> bytes:
        """The bytes of this record at this slot."""
        return _sealed(_RECORD.pack(_RESERVED, 0, 0, 0, self.holder, 0, b"", b"", b""), slot)


@dataclass(frozen=True, slots=True)
class UsedRecord:
    """The slot holds this block of this namespace, whose bytes have this checksum."""

    namespace: int
    block: BlockRecord
    checksum: int

    def encode(self, slot: int) -> bytes:
        """The bytes of this record at this slot; `ValueError` for what has no room in one."""
        block = self.block
        if len(block.tenant) > MAX_TENANT_BYTES or len(block.block_hash) != HASH_BYTES:
            raise ValueError(f"tenants have at most {MAX_TENANT_BYTES} bytes, hashes {HASH_BYTES}")
        numbers = (_USED, 0, len(block.tenant), self.namespace, 0, self.checksum)
        body = _RECORD.pack(*numbers, block.tenant, block.block_hash, block.parent)
        raw = _sealed(body, slot)
        return _with_flag(raw, STORED) if block.is_stored else raw


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """What the slot holds cannot be told."""


SlotRecord = UsedRecord | ReservedRecord | DamagedRecord


def decode_record(raw: bytes, slot: int) -> SlotRecord | None:
    """What the `RECORD_BYTES` of a slot say; None: it holds nothing."""
    if raw == FREE:
        return None
    if not _is_whole(_with_flag(raw, 0), _RECORD.size, slot):
        return DamagedRecord()
    state, flag, tenant_bytes, namespace, holder, checksum, tenant, name, parent = (
        _RECORD.unpack_from(raw)
    )
    if state == _RESERVED:
        return ReservedRecord(holder)
    hashes = BlockHash(name), BlockHash(parent)
    block = BlockRecord(*hashes, tenant[:tenant_bytes], flag == STORED)
    return UsedRecord(namespace, block, checksum)


def peek_block(raw: bytes) -> tuple[int, BlockHash] | None:
    """Namespace and name of the block in a record that is known to be whole; None for no block."""
    if raw[0] != _USED:
        return None
    return _NUMBER.unpack_from(raw, 4)[0], BlockHash(raw[_NAME_OFFSET : _NAME_OFFSET + HASH_BYTES])


def decode_payload_checksum(raw: bytes) -> int:
    """The checksum of the block's bytes, from the 8 bytes at `PAYLOAD_CHECKSUM_OFFSET`."""
    checksum: int = _CHECKSUM.unpack(raw)[0]
    return checksum


def encode_namespace(fingerprint: str, block_bytes: int) -> bytes:
    """An entry of the table of namespaces; `ValueError` for a fingerprint that has no room."""
    encoded = fingerprint.encode()
    if not 0 < len(encoded) <= MAX_FINGERPRINT_BYTES:
        raise ValueError(f"a fingerprint has 1 to {MAX_FINGERPRINT_BYTES} bytes: {fingerprint!r}")
    return _sealed(_NAMESPACE.pack(len(encoded), encoded, block_bytes), 0)


def decode_namespace(raw: bytes) -> tuple[str, int] | None:
    """Fingerprint and block bytes; None for an entry that was not written, or not to its end."""
    num_bytes, fingerprint, block_bytes = _NAMESPACE.unpack_from(raw)
    if not num_bytes or not _is_whole(raw, _NAMESPACE.size, 0):
        return None
    return fingerprint[:num_bytes].decode(), block_bytes


def encode_extent(namespace: int, slot_units: int) -> int:
    """An entry of the extent table."""
    word = (namespace + 1) << 32 | slot_units
    return word | _extent_checksum(word) << 48


def decode_extent(word: int) -> tuple[int, int] | None:
    """Namespace and slot units; None for nobody's; raises `DamagedRecordsError`."""
    if not word:
        return None
    body = word & 0xFFFF_FFFF_FFFF
    if word >> 48 != _extent_checksum(body) or body >> 32 == 0 or not body & 0xFFFF_FFFF:
        raise DamagedRecordsError("the extent table is damaged")
    return (body >> 32) - 1, body & 0xFFFF_FFFF


def _extent_checksum(word: int) -> int:
    return xxhash.xxh3_64_intdigest(word.to_bytes(8, "little")) & 0xFFFF


def _with_flag(raw: bytes, flag: int) -> bytes:
    return raw[:STORED_OFFSET] + bytes((flag,)) + raw[STORED_OFFSET + 1 :]


def _sealed(body: bytes, seed: int) -> bytes:
    """`body` with its checksum."""
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, seed=seed))


def _is_whole(raw: bytes, num_bytes: int, seed: int) -> bool:
    expected: int = _CHECKSUM.unpack_from(raw, num_bytes)[0]
    return expected == xxhash.xxh3_64_intdigest(raw[:num_bytes], seed=seed)
