"""The stored object: one run of consecutive blocks as one valid Arrow IPC file.

A private binary format would need private tools to look into a store. So an object is what
`pyarrow.ipc.open_file` reads: one record batch with the columns `hash`, `parent`, `xxh3_64` and
`payload`. But Arrow would copy the payloads into fresh memory, so it only makes the *framing* here:
the bytes before the payloads (`head`) and after them (`tail`). They depend on the namespace and the
number of blocks alone and are cached. The head ends where the payloads begin, at a multiple of 4096
bytes, and its schema metadata says where everything lies:

    kvcommons.format          version of this format
    kvcommons.namespace       `Namespace.to_json()`
    kvcommons.num_blocks      fixed-width decimal, as are the four offsets
    kvcommons.<column>_offset where the bytes of a column begin in the file
    kvcommons.index_xxh3_64   checksum over all of the above and the three small columns
    kvcommons.pad             makes the payloads begin at a multiple of 4096

Failure prevented: garbage attended to. The index checksum covers what the reader uses of the head;
each payload's checksum is seeded from its block hash, so good bytes under a wrong name fail too.
"""

import hashlib
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import xxhash

from shared_cache.errors import CorruptBlockError, ForeignBlockError
from shared_cache.hashing import HASH_BYTES, BlockHash
from shared_cache.namespace import FORMAT_VERSION, Namespace
from shared_cache.store import BlockRun

PAYLOAD_ALIGNMENT_BYTES = 4096
FIRST_READ_BYTES = 16 * 1024
"""Holds the whole head of a run of up to about 150 blocks."""

MAX_HEAD_BYTES = 64 << 20
"""A head that claims to be longer is damaged; keeps a flipped digit from asking for terabytes."""

_MAGIC = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"
_PREFIX_BYTES = len(_MAGIC) + 8
_CHECKSUM_BYTES = 8
_INDEX_COLUMNS = {"hash": HASH_BYTES, "parent": HASH_BYTES, "xxh3_64": _CHECKSUM_BYTES}
_NUMBER_KEYS = ("num_blocks", *(f"{column}_offset" for column in (*_INDEX_COLUMNS, "payload")))
_NUMBER_DIGITS = 20
_LAYOUTS_KEPT = 256


@dataclass(frozen=True, slots=True)
class RunHead:
    """What a head says of its run; `checksums[i]` belongs to block `hashes[i]`."""

    parent: BlockHash
    hashes: tuple[BlockHash, ...]
    checksums: tuple[int, ...]
    payload_offset: int


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


def block_checksum(block_hash: BlockHash, payload: memoryview) -> int:
    """xxh3_64 over a contiguous payload, seeded from the name it is stored under."""
    return xxhash.xxh3_64_intdigest(payload, seed=int.from_bytes(block_hash[:8], "little"))


def verify(payload: memoryview, block_hash: BlockHash, checksum: int) -> bool:
    """Whether `payload` is what was stored under `block_hash` with `checksum`."""
    return block_checksum(block_hash, payload) == checksum


def encode(namespace: Namespace, run: BlockRun) -> EncodedRun:
    """`run`, which must not be empty, framed as one stored object; copies no payload."""
    block_bytes = namespace.layout.block_bytes
    if any(payload.nbytes != block_bytes for payload in run.payloads):
        raise ValueError(f"a payload has a wrong size; a block has {block_bytes} bytes")
    if any(len(block_hash) != HASH_BYTES for block_hash in (run.parent, *run.hashes)):
        raise ValueError(f"a block hash has a wrong size; it has {HASH_BYTES} bytes")
    layout = _layout(namespace, len(run.hashes))
    checksums = tuple(map(block_checksum, run.hashes, run.payloads))
    hashes = b"".join(run.hashes)
    columns = {
        "hash": hashes,
        "parent": run.parent + hashes[:-HASH_BYTES],
        "xxh3_64": struct.pack(f"<{len(checksums)}Q", *checksums),
    }
    index_checksum = _index_checksum(layout.fields, columns)
    head = bytearray(layout.head.replace(layout.placeholder, index_checksum))
    for name, column in columns.items():
        offset = layout.offsets[name]
        head[offset : offset + len(column)] = column
    tail = layout.tail.replace(layout.placeholder, index_checksum)
    index = RunHead(run.parent, run.hashes, checksums, layout.offsets["payload"])
    return EncodedRun(bytes(head), run.payloads, tail, index)


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

    Raises `ForeignBlockError` for another version or namespace, else `CorruptBlockError`.
    """
    fields = _fields(start)
    if fields["format"] != str(FORMAT_VERSION).encode():
        raise ForeignBlockError(f"format {fields['format']!r}, this program reads {FORMAT_VERSION}")
    if fields["namespace"] != _namespace_text(namespace):
        raise ForeignBlockError(f"written for another namespace: {fields['namespace'][:200]!r}")
    numbers = _numbers(fields)
    num_blocks, payload_offset = numbers["num_blocks"], numbers["payload_offset"]
    columns: dict[str, bytes] = {}
    for name, width in _INDEX_COLUMNS.items():
        offset = numbers[f"{name}_offset"]
        end = offset + width * num_blocks
        if not num_blocks or not _PREFIX_BYTES < offset < end <= payload_offset <= len(start):
            raise CorruptBlockError(f"column {name} lies outside of the head")
        columns[name] = start[offset:end]
    if _index_checksum(fields, columns) != fields["index_xxh3_64"]:
        raise CorruptBlockError("the index checksum does not match")
    hashes, parents = (
        [BlockHash(columns[c][i : i + HASH_BYTES]) for i in range(0, len(columns[c]), HASH_BYTES)]
        for c in ("hash", "parent")
    )
    if parents[1:] != hashes[:-1]:
        raise CorruptBlockError("the blocks are not consecutive")
    checksums = struct.unpack(f"<{num_blocks}Q", columns["xxh3_64"])
    return RunHead(parents[0], tuple(hashes), checksums, payload_offset)


def _fields(start: bytes) -> Mapping[str, bytes]:
    """The `kvcommons.` entries of the schema metadata that readers use."""
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(start).slice(len(_MAGIC)))
        metadata: Mapping[bytes, bytes] = schema.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise CorruptBlockError(f"the schema is unreadable: {error}") from error
    try:
        keys = ("format", "namespace", "index_xxh3_64", *_NUMBER_KEYS)
        return {key: metadata[f"kvcommons.{key}".encode()] for key in keys}
    except KeyError as error:
        raise ForeignBlockError(f"an Arrow file without {error.args[0]!r}") from error


def _numbers(fields: Mapping[str, bytes]) -> dict[str, int]:
    for key in _NUMBER_KEYS:
        if len(fields[key]) != _NUMBER_DIGITS or not fields[key].isdigit():
            raise CorruptBlockError(f"{key} is not a number: {fields[key][:40]!r}")
    return {key: int(fields[key]) for key in _NUMBER_KEYS}


def _index_checksum(fields: Mapping[str, bytes], columns: Mapping[str, bytes]) -> bytes:
    """16 hexadecimal digits over everything that a reader takes from a head."""
    digest = xxhash.xxh3_64()
    for key in ("format", "namespace", *_NUMBER_KEYS):
        digest.update(len(fields[key]).to_bytes(8, "little") + fields[key])
    for name in _INDEX_COLUMNS:
        digest.update(columns[name])
    return digest.hexdigest().encode()


@lru_cache(maxsize=16)
def _namespace_text(namespace: Namespace) -> bytes:
    return namespace.to_json().encode()


@dataclass(frozen=True, slots=True)
class _Layout:
    """The framing of every run of one length: zeros where the columns go.

    `placeholder` occurs once in `head` and once in `tail`, where the index checksum goes.
    """

    head: bytes
    tail: bytes
    offsets: Mapping[str, int]
    fields: Mapping[str, bytes]
    placeholder: bytes


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _layout(namespace: Namespace, num_blocks: int) -> _Layout:
    """Let Arrow frame `num_blocks` blocks of zeros: once to measure, once with what it showed."""
    if num_blocks < 1:
        raise ValueError("a stored run has at least one block")
    placeholder = hashlib.sha256(_namespace_text(namespace)).hexdigest()[:16].encode()
    fields = {
        "format": str(FORMAT_VERSION).encode(),
        "namespace": _namespace_text(namespace),
        "index_xxh3_64": placeholder,
        **dict.fromkeys(_NUMBER_KEYS, b"0" * _NUMBER_DIGITS),
    }
    block_bytes = namespace.layout.block_bytes
    measured = _frame(fields, num_blocks, block_bytes, 0).offsets
    pad_bytes = -measured["payload"] % PAYLOAD_ALIGNMENT_BYTES
    offsets = {name: offset + pad_bytes for name, offset in measured.items()}
    numbers = {f"{name}_offset": offset for name, offset in offsets.items()}
    for key, number in {**numbers, "num_blocks": num_blocks}.items():
        fields[key] = f"{number:0{_NUMBER_DIGITS}d}".encode()
    frame = _frame(fields, num_blocks, block_bytes, pad_bytes)
    head, tail = bytes(frame.head), bytes(frame.tail)
    if frame.offsets != offsets or {head.count(placeholder), tail.count(placeholder)} != {1}:
        raise RuntimeError(f"pyarrow {pa.__version__} frames files in a way unknown to kvcommons")
    return _Layout(head, tail, offsets, fields, placeholder)


class _FrameSink:
    """The file that Arrow writes into: keeps the framing, notes where the columns begin.

    Columns are recognised by their address, and payload bytes are never looked at.
    """

    closed = False

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._names = {column.address: name for name, column in columns.items()}
        self._position = 0
        self.offsets: dict[str, int] = {}
        self.head = bytearray()
        self.tail = bytearray()

    def write(self, data: Any) -> int:
        num_bytes: int = memoryview(data).nbytes
        name = self._names.get(data.address) if isinstance(data, pa.Buffer) else None
        if name is not None:
            self.offsets[name] = self._position
        if name != "payload":
            (self.tail if "payload" in self.offsets else self.head).extend(data)
        self._position += num_bytes
        return num_bytes

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Nothing is held."""


def _frame(
    fields: Mapping[str, bytes], num_blocks: int, block_bytes: int, pad_bytes: int
) -> _FrameSink:
    """What Arrow writes for a run of zeros; the payloads are untouched, so never allocated."""
    metadata = {f"kvcommons.{key}".encode(): value for key, value in fields.items()}
    schema = pa.schema(
        [
            pa.field("hash", pa.binary(HASH_BYTES), nullable=False),
            pa.field("parent", pa.binary(HASH_BYTES), nullable=False),
            pa.field("xxh3_64", pa.uint64(), nullable=False),
            pa.field("payload", pa.binary(block_bytes), nullable=False),
        ],
        metadata={**metadata, b"kvcommons.pad": b"." * pad_bytes},
    )
    sizes = {**_INDEX_COLUMNS, "payload": block_bytes}
    zeros = {name: pa.py_buffer(mmap.mmap(-1, num_blocks * size)) for name, size in sizes.items()}
    sink = _FrameSink(zeros)
    arrays: Sequence[Any] = [
        pa.Array.from_buffers(field.type, num_blocks, [None, zeros[field.name]]) for field in schema
    ]
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink
