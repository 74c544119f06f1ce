"""The stored object: one run of consecutive blocks as one valid Arrow IPC file.

A private binary format would need private tools to look into a store. So an object is what
`pyarrow.ipc.open_file` reads: one record batch with the columns `hash`, `parent`, `xxh3_64`,
`stored_bytes` and `payload`. Arrow only makes the framing (see `framing`): the bytes before the
payloads (`head`) and after them (`tail`). The head ends where the payloads begin, at a multiple of
4096 bytes, and its schema metadata says where everything lies:

    kvcommons.format          version of this format
    kvcommons.namespace       `Namespace.to_json()`
    kvcommons.codec           how payloads are stored: none, shuffle-zstd (see `compression`)
    kvcommons.tenant          who pays for the blocks, 16 hexadecimal digits; zeros: nobody. The
                              first objects of this version have no such entry
    kvcommons.num_blocks      fixed-width decimal, as are the five offsets
    kvcommons.<column>_offset where the bytes of a column begin in the file
    kvcommons.index_xxh3_64   checksum over all of the above and the four small columns
    kvcommons.pad             makes the payloads begin at a multiple of 4096

Failure prevented: garbage attended to. The index checksum covers what the reader uses of the head;
each block's checksum is over its bytes before the codec and seeded from its hash, so good bytes
under a wrong name fail too.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import pyarrow as pa
import xxhash

from shared_cache.checksum import block_checksum
from shared_cache.errors import CorruptBlockError, ForeignBlockError
from shared_cache.hashing import HASH_BYTES, TENANT_BYTES, BlockHash
from shared_cache.namespace import DTYPE_BYTES, FORMAT_VERSION, Namespace
from shared_cache.parallel import run_all
from shared_cache.stores.compression import CODEC_NAMES, PLAIN, CodecName, compress
from shared_cache.stores.framing import (
    INDEX_COLUMNS,
    NUMBER_DIGITS,
    NUMBER_KEYS,
    framing_of,
    namespace_text,
    plain_framing,
)
from shared_cache.stores.store import BlockRun

FIRST_READ_BYTES = 16 * 1024
"""Holds the whole head of a run of up to about 150 blocks."""

MAX_HEAD_BYTES = 64 << 20
"""A head that claims to be longer is damaged; keeps a flipped digit from asking for terabytes."""

_MAGIC = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"
_PREFIX_BYTES = len(_MAGIC) + 8
_TENANT_KEY = b"kvcommons.tenant"
_NOBODY = bytes(TENANT_BYTES)


@dataclass(frozen=True, slots=True)
class RunHead:
    """What a head says of its run; `checksums[i]` belongs to block `hashes[i]`.

    `ends[i]` is where that block's stored bytes end, counted from `payload_offset`, in a run that
    is compressed as numbers of `element_bytes`; empty in one whose blocks are stored as they are.
    `tenant` is who pays for them.
    """

    parent: BlockHash
    hashes: tuple[BlockHash, ...]
    checksums: tuple[int, ...]
    payload_offset: int
    ends: tuple[int, ...] = ()
    element_bytes: int = 1
    tenant: bytes = b""

    def place_of(self, row: int, num_blocks: int, block_bytes: int) -> tuple[int, int]:
        """Where the stored bytes of some blocks begin in the object, and where they end."""
        if not self.ends:
            start = self.payload_offset + row * block_bytes
            return start, start + num_blocks * block_bytes
        start = self.ends[row - 1] if row else 0
        return self.payload_offset + start, self.payload_offset + self.ends[row + num_blocks - 1]


@dataclass(frozen=True, slots=True)
class EncodedRun:
    """A run ready to be stored: `head`, then the payloads as they are, then `tail`."""

    head: bytes
    payloads: tuple[memoryview, ...]
    tail: bytes
    index: RunHead

    @property
    def parts(self) -> tuple[memoryview, ...]:
        """The object's bytes in order, uncopied."""
        return (memoryview(self.head), *self.payloads, memoryview(self.tail))


def verify(payload: memoryview, block_hash: BlockHash, checksum: int) -> bool:
    """Whether `payload` is what was stored under `block_hash` with `checksum`."""
    return block_checksum(block_hash, payload) == checksum


def encode(namespace: Namespace, run: BlockRun, codec: CodecName = PLAIN) -> EncodedRun:
    """`run`, which must not be empty, framed as one stored object; copies no plain payload."""
    block_bytes = namespace.layout.block_bytes
    if any(payload.nbytes != block_bytes for payload in run.payloads):
        raise ValueError(f"a payload has a wrong size; a block has {block_bytes} bytes")
    if len(run.tenant) not in (0, TENANT_BYTES):
        raise ValueError(f"a tenant has a wrong size; it has {TENANT_BYTES} bytes")
    if any(len(block_hash) != HASH_BYTES for block_hash in (run.parent, *run.hashes)):
        raise ValueError(f"a block hash has a wrong size; it has {HASH_BYTES} bytes")
    checksums = run.checksums or tuple(map(block_checksum, run.hashes, run.payloads))
    payloads = run.payloads
    ends: tuple[int, ...] = ()
    element_bytes = 1
    if codec != PLAIN:
        element_bytes = DTYPE_BYTES[namespace.layout.dtype]
        jobs = (partial(compress, payload, element_bytes) for payload in payloads)
        payloads = tuple(run_all(jobs))
        ends = tuple(accumulate(payload.nbytes for payload in payloads))
    index = RunHead(run.parent, run.hashes, checksums, 0, ends, element_bytes, run.tenant)
    return _framed(namespace, codec, index, payloads)


def _framed(
    namespace: Namespace, codec: CodecName, index: RunHead, payloads: tuple[memoryview, ...]
) -> EncodedRun:
    sizes = tuple(payload.nbytes for payload in payloads)
    framing = (
        plain_framing(namespace, len(sizes))
        if codec == PLAIN
        else framing_of(namespace, codec, sizes)
    )
    hashes = b"".join(index.hashes)
    columns = {
        "hash": hashes,
        "parent": index.parent + hashes[:-HASH_BYTES],
        "xxh3_64": struct.pack(f"<{len(sizes)}Q", *index.checksums),
        "stored_bytes": struct.pack(f"<{len(sizes)}Q", *sizes),
    }
    tenant = (index.tenant or _NOBODY).hex().encode()
    index_checksum = _index_checksum({**framing.fields, "tenant": tenant}, columns)

    def filled(text: bytes) -> bytearray:
        named = text.replace(framing.tenant_placeholder, tenant)
        return bytearray(named.replace(framing.placeholder, index_checksum))

    head = filled(framing.head)
    for name, column in columns.items():
        offset = framing.offsets[name]
        head[offset : offset + len(column)] = column
    index = replace(index, payload_offset=framing.offsets["payload"])
    return EncodedRun(bytes(head), payloads, bytes(filled(framing.tail)), index)


def bytes_needed(start: bytes) -> int:
    """How long `start`, the beginning of an object, must be for `parse_head`.

    May ask twice: the first answer can be what is needed to know. Raises `BlockFormatError`.
    """
    if len(start) < _PREFIX_BYTES:
        raise CorruptBlockError(f"cut short after {len(start)} bytes")
    if not start.startswith(_MAGIC + _CONTINUATION):
        raise CorruptBlockError("not an Arrow IPC file")
    schema_bytes = int.from_bytes(start[_PREFIX_BYTES - 4 : _PREFIX_BYTES], "little", signed=True)
    needed = _PREFIX_BYTES + schema_bytes
    if schema_bytes > 0 and needed <= len(start):
        needed = _numbers(_fields(start))["payload_offset"]
    if not _PREFIX_BYTES < needed <= MAX_HEAD_BYTES:
        raise CorruptBlockError(f"a head of {needed} bytes is not believable")
    return needed


def parse_head(start: bytes, namespace: Namespace) -> RunHead:
    """The index of the object that begins with `start` (at least `bytes_needed`), checked.

    Raises `ForeignBlockError` for another version, namespace or codec, else `CorruptBlockError`.
    """
    fields = _fields(start)
    if fields["format"] != str(FORMAT_VERSION).encode():
        raise ForeignBlockError(f"format {fields['format']!r}, this program reads {FORMAT_VERSION}")
    if fields["namespace"] != namespace_text(namespace):
        raise ForeignBlockError(f"written for another namespace: {fields['namespace'][:200]!r}")
    columns = _index_columns(start, fields)
    if _index_checksum(fields, columns) != fields["index_xxh3_64"]:
        raise CorruptBlockError("the index checksum does not match")
    hashes, parents = (
        [BlockHash(columns[c][i : i + HASH_BYTES]) for i in range(0, len(columns[c]), HASH_BYTES)]
        for c in ("hash", "parent")
    )
    if parents[1:] != hashes[:-1]:
        raise CorruptBlockError("the blocks are not consecutive")
    checksums = struct.unpack(f"<{len(hashes)}Q", columns["xxh3_64"])
    stored_bytes = struct.unpack(f"<{len(hashes)}Q", columns["stored_bytes"])
    ends = _ends(fields["codec"], stored_bytes, namespace.layout.block_bytes)
    payload_offset = _numbers(fields)["payload_offset"]
    element_bytes = DTYPE_BYTES[namespace.layout.dtype] if ends else 1
    tenant = _tenant(fields.get("tenant", b""))
    return RunHead(
        parents[0], tuple(hashes), checksums, payload_offset, ends, element_bytes, tenant
    )


def _index_columns(start: bytes, fields: Mapping[str, bytes]) -> dict[str, bytes]:
    """The bytes of the small columns."""
    numbers = _numbers(fields)
    num_blocks, payload_offset = numbers["num_blocks"], numbers["payload_offset"]
    columns: dict[str, bytes] = {}
    for name, width in INDEX_COLUMNS.items():
        offset = numbers[f"{name}_offset"]
        end = offset + width * num_blocks
        if not num_blocks or not _PREFIX_BYTES < offset < end <= payload_offset <= len(start):
            raise CorruptBlockError(f"column {name} lies outside of the head")
        columns[name] = start[offset:end]
    return columns


def _tenant(digits: bytes) -> bytes:
    try:
        tenant = bytes.fromhex(digits.decode())
    except ValueError as error:
        raise CorruptBlockError(f"the tenant is no number: {digits[:40]!r}") from error
    return b"" if tenant == _NOBODY else tenant


def _ends(codec: bytes, stored_bytes: tuple[int, ...], block_bytes: int) -> tuple[int, ...]:
    """`RunHead.ends` of a run whose payloads have these sizes."""
    if codec.decode(errors="replace") not in CODEC_NAMES:
        raise ForeignBlockError(f"codec {codec[:40]!r}, this program reads {CODEC_NAMES}")
    is_plain = codec == PLAIN.encode()
    least_bytes = block_bytes if is_plain else 1
    if not all(least_bytes <= size <= block_bytes for size in stored_bytes):
        raise CorruptBlockError("a payload has a size that no block can have")
    return () if is_plain else tuple(accumulate(stored_bytes))


def _fields(start: bytes) -> Mapping[str, bytes]:
    """The `kvcommons.` entries of the schema metadata that readers use."""
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(start).slice(len(_MAGIC)))
        metadata: Mapping[bytes, bytes] = schema.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise CorruptBlockError(f"the schema is unreadable: {error}") from error
    try:
        keys = ("format", "namespace", "codec", "index_xxh3_64", *NUMBER_KEYS)
        fields = {key: metadata[f"kvcommons.{key}".encode()] for key in keys}
    except KeyError as error:
        raise ForeignBlockError(f"an Arrow file without {error.args[0]!r}") from error
    tenant = metadata.get(_TENANT_KEY)
    return fields if tenant is None else {**fields, "tenant": tenant}


def _numbers(fields: Mapping[str, bytes]) -> dict[str, int]:
    for key in NUMBER_KEYS:
        if len(fields[key]) != NUMBER_DIGITS or not fields[key].isdigit():
            raise CorruptBlockError(f"{key} is not a number: {fields[key][:40]!r}")
    return {key: int(fields[key]) for key in NUMBER_KEYS}


def _index_checksum(fields: Mapping[str, bytes], columns: Mapping[str, bytes]) -> bytes:
    """16 hexadecimal digits over everything that a reader takes from a head."""
    digest = xxhash.xxh3_64()
    tenant = ("tenant",) if "tenant" in fields else ()
    for key in ("format", "namespace", "codec", *tenant, *NUMBER_KEYS):
        digest.update(len(fields[key]).to_bytes(8, "little") + fields[key])
    for name in INDEX_COLUMNS:
        digest.update(columns[name])
    return digest.hexdigest().encode()
