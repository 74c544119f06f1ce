"""The framing of a stored run: what Arrow writes before, between and after the columns.

Arrow would copy the payloads into fresh memory, so it frames zeros instead, once for every length
of a run, and the columns are put in their places afterwards. Failure prevented: an offset that says
one thing and a file that says another. Where the columns begin is seen as Arrow writes them, not
calculated, and a version of Arrow that does it in another way is an error at once.
"""

import hashlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from shared_cache.hashing import HASH_BYTES, TENANT_BYTES
from shared_cache.namespace import FORMAT_VERSION, Namespace
from shared_cache.stores.compression import PLAIN, CodecName

PAYLOAD_ALIGNMENT_BYTES = 4096
INDEX_COLUMNS = {"hash": HASH_BYTES, "parent": HASH_BYTES, "xxh3_64": 8, "stored_bytes": 8}
"""The small columns, each with the bytes that a block takes in it."""

NUMBER_KEYS = ("num_blocks", *(f"{column}_offset" for column in (*INDEX_COLUMNS, "payload")))
NUMBER_DIGITS = 20
_LAYOUTS_KEPT = 256


@dataclass(frozen=True, slots=True)
class Framing:
    """The bytes around the payloads of a run: zeros where the index columns go.

    `offsets` says where each column begins in the file. `placeholder` occurs once in `head` and
    once in `tail`, where the index checksum goes, and so does `tenant_placeholder`; `fields` are
    the metadata that the checksum covers.
    """

    head: bytes
    tail: bytes
    offsets: Mapping[str, int]
    fields: Mapping[str, bytes]
    placeholder: bytes
    tenant_placeholder: bytes


def plain_framing(namespace: Namespace, num_blocks: int) -> Framing:
    """The framing of a run whose payloads are the blocks themselves."""
    return _plain_framing(namespace, num_blocks)


def framing_of(namespace: Namespace, codec: CodecName, stored_bytes: Sequence[int]) -> Framing:
    """The framing of a run whose payloads have these sizes."""
    if not stored_bytes:
        raise ValueError("a stored run has at least one block")
    digest = hashlib.sha256(namespace_text(namespace)).hexdigest().encode()
    placeholder, tenant = digest[:16], digest[16 : 16 + 2 * TENANT_BYTES]
    fields = {
        "format": str(FORMAT_VERSION).encode(),
        "namespace": namespace_text(namespace),
        "codec": codec.encode(),
        "index_xxh3_64": placeholder,
        "tenant": tenant,
        **dict.fromkeys(NUMBER_KEYS, b"0" * NUMBER_DIGITS),
    }
    measured = _frame(fields, stored_bytes, 0).offsets
    pad_bytes = -measured["payload"] % PAYLOAD_ALIGNMENT_BYTES
    offsets = {name: offset + pad_bytes for name, offset in measured.items()}
    numbers = {f"{name}_offset": offset for name, offset in offsets.items()}
    for key, number in {**numbers, "num_blocks": len(stored_bytes)}.items():
        fields[key] = f"{number:0{NUMBER_DIGITS}d}".encode()
    frame = _frame(fields, stored_bytes, pad_bytes)
    head, tail = bytes(frame.head), bytes(frame.tail)
    counts = {part.count(text) for part in (head, tail) for text in (placeholder, tenant)}
    if frame.offsets != offsets or counts != {1}:
        raise RuntimeError(f"pyarrow {pa.__version__} frames files in a way unknown to kvcommons")
    return Framing(head, tail, offsets, fields, placeholder, tenant)


@lru_cache(maxsize=16)
def namespace_text(namespace: Namespace) -> bytes:
    """How stored objects name their namespace."""
    return namespace.to_json().encode()


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _plain_framing(namespace: Namespace, num_blocks: int) -> Framing:
    return framing_of(namespace, PLAIN, (namespace.layout.block_bytes,) * num_blocks)


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


def _frame(fields: Mapping[str, bytes], stored_bytes: Sequence[int], pad_bytes: int) -> _FrameSink:
    """What Arrow writes for a run of zeros; the payloads are untouched, so never allocated."""
    is_plain = fields["codec"] == PLAIN.encode()
    metadata = {f"kvcommons.{key}".encode(): value for key, value in fields.items()}
    schema = pa.schema(
        [
            pa.field("hash", pa.binary(HASH_BYTES), nullable=False),
            pa.field("parent", pa.binary(HASH_BYTES), nullable=False),
            pa.field("xxh3_64", pa.uint64(), nullable=False),
            pa.field("stored_bytes", pa.uint64(), nullable=False),
            pa.field(
                "payload",
                pa.binary(stored_bytes[0]) if is_plain else pa.large_binary(),
                nullable=False,
            ),
        ],
        metadata={**metadata, b"kvcommons.pad": b"." * pad_bytes},
    )
    num_blocks = len(stored_bytes)
    sizes = {name: num_blocks * width for name, width in INDEX_COLUMNS.items()}
    sizes["payload"] = sum(stored_bytes)
    zeros = {name: pa.py_buffer(mmap.mmap(-1, size)) for name, size in sizes.items()}
    ends = np.fromiter(accumulate(stored_bytes, initial=0), np.int64, num_blocks + 1)
    places = [] if is_plain else [pa.py_buffer(ends)]
    sink = _FrameSink(zeros)
    arrays: Sequence[Any] = [
        pa.Array.from_buffers(
            field.type,
            num_blocks,
            [None, *(places if field.name == "payload" else []), zeros[field.name]],
        )
        for field in schema
    ]
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink
