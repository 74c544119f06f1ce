"""The stored format: readable by plain Arrow, stable over versions, and never wrong silently."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.errors import (
    BlockFormatError,
    ConfigError,
    CorruptBlockError,
    ForeignBlockError,
)
from shared_cache.hashing import BlockHash
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.stores import codec
from shared_cache.stores.compression import (
    PLAIN,
    SHUFFLE_ZSTD,
    CodecName,
    check_codec,
    compress,
    decompress,
)
from shared_cache.stores.framing import INDEX_COLUMNS
from shared_cache.stores.store import BlockRun
from tests.shared_cache.fakes import NAMESPACE, chain_of, run_of

DATA_FOLDER = Path(__file__).parents[1] / "data"
GOLDEN_FILE = DATA_FOLDER / "golden_run.arrow"
GOLDEN_COMPRESSED_FILE = DATA_FOLDER / "golden_run_compressed.arrow"
OLD_VERSION_FILE = DATA_FOLDER / "golden_run_v1.arrow"
GOLDEN_NAMESPACE = Namespace(
    "golden", "0123abcd", "torch", BlockLayout(2, 2, 1, 4, 4, "float16"), tp_rank=1, tp_size=2
)
GOLDEN_HASHES = tuple(BlockHash(bytes([first]) * 32) for first in (0x11, 0x22, 0x33))
GOLDEN_RUN = BlockRun(
    BlockHash(bytes(32)),
    GOLDEN_HASHES,
    tuple(memoryview(bytes(range(first, first + 128))) for first in (0, 64, 128)),
)
SMALL = run_of(chain_of(2))
NUMBERS = BlockLayout(2, 2, 1, 8, 16, "bfloat16")


def mixed_run(num_blocks: int, layout: BlockLayout = NUMBERS, seed: int = 0) -> BlockRun:
    """Blocks of which every third is noise, and the others are numbers of one magnitude."""
    random_source = np.random.default_rng(seed)
    size = layout.block_bytes
    payloads = []
    for row in range(num_blocks):
        numbers = random_source.uniform(1.0, 1.9, size // 4).astype("<f4")
        noise = random_source.integers(0, 256, size, np.uint8)
        payload = noise if row % 3 == 2 else np.repeat(numbers.view("<u4") >> 16, 2).astype("<u2")
        payloads.append(memoryview(payload.tobytes()))
    hashes = tuple(BlockHash(bytes([row + 1]) * 32) for row in range(num_blocks))
    return BlockRun(BlockHash(bytes(32)), hashes, tuple(payloads))


def stored_bytes(
    run: BlockRun, namespace: Namespace = NAMESPACE, codec_name: CodecName = PLAIN
) -> bytes:
    return b"".join(codec.encode(namespace, run, codec_name).parts)


def good_blocks(data: bytes, namespace: Namespace = NAMESPACE) -> dict[BlockHash, bytes]:
    """What a careful reader takes from `data`; raises `BlockFormatError` for a bad head."""
    if (needed := codec.bytes_needed(data)) <= len(data):
        needed = codec.bytes_needed(data[:needed])
    head = codec.parse_head(data[:needed], namespace)
    size = namespace.layout.block_bytes
    blocks = {}
    for row, (block_hash, checksum) in enumerate(zip(head.hashes, head.checksums, strict=True)):
        start, end = head.place_of(row, 1, size)
        stored, buffer = memoryview(data)[start:end], memoryview(bytearray(size))
        is_whole = stored.nbytes == end - start
        is_decoded = is_whole and decompress(stored, head.element_bytes, buffer)
        if is_decoded and codec.verify(buffer, block_hash, checksum):
            blocks[block_hash] = bytes(buffer)
    return blocks


def blocks_of(run: BlockRun) -> dict[BlockHash, bytes]:
    return {h: bytes(p) for h, p in zip(run.hashes, run.payloads, strict=True)}


def arrow_table(data: bytes) -> pa.Table:
    reader = pa.ipc.open_file(pa.py_buffer(data))
    assert reader.num_record_batches == 1
    return reader.read_all()


@st.composite
def namespaces_and_runs(draw: st.DrawFn) -> tuple[Namespace, BlockRun]:
    layout = BlockLayout(draw(st.integers(1, 5)), 1, 1, 1, draw(st.integers(1, 40)), "float16")
    namespace = Namespace(draw(st.text(max_size=30)), "r", "fake", layout)
    hashes = st.binary(min_size=32, max_size=32).map(BlockHash)
    names = draw(st.lists(hashes, min_size=1, max_size=40))
    size = layout.block_bytes
    payloads = [draw(st.binary(min_size=1, max_size=1)) * size for _ in names]
    return namespace, BlockRun(draw(hashes), tuple(names), tuple(map(memoryview, payloads)))


@given(namespaces_and_runs())
def test_round_trip_with_and_without_arrow(case: tuple[Namespace, BlockRun]) -> None:
    namespace, run = case
    encoded = codec.encode(namespace, run)
    data = b"".join(encoded.parts)
    assert codec.parse_head(data, namespace) == encoded.index
    assert encoded.index.payload_offset == len(encoded.head)
    assert len(encoded.head) % 4096 == 0
    table = arrow_table(data)
    assert table["hash"].to_pylist() == list(run.hashes) == list(encoded.index.hashes)
    assert table["parent"].to_pylist() == [run.parent, *run.hashes[:-1]]
    assert table["xxh3_64"].to_pylist() == list(encoded.index.checksums)
    assert table["payload"].to_pylist() == [bytes(payload) for payload in run.payloads]


def test_payloads_are_not_copied() -> None:
    encoded = codec.encode(NAMESPACE, SMALL)
    assert all(a is b for a, b in zip(encoded.parts[1:-1], SMALL.payloads, strict=True))


def test_the_schema_says_what_a_person_needs() -> None:
    schema = arrow_table(stored_bytes(SMALL)).schema
    assert schema.names == ["hash", "parent", "xxh3_64", "stored_bytes", "payload"]
    assert schema.types == [pa.binary(32), pa.binary(32), pa.uint64(), pa.uint64(), pa.binary(64)]
    assert schema.metadata[b"kvcommons.format"] == b"2"
    assert schema.metadata[b"kvcommons.codec"] == b"none"
    assert Namespace.from_json(schema.metadata[b"kvcommons.namespace"].decode()) == NAMESPACE
    assert int(schema.metadata[b"kvcommons.num_blocks"]) == 2
    assert int(schema.metadata[b"kvcommons.payload_offset"]) == 4096


def test_an_object_of_this_version_stays_readable() -> None:
    data = GOLDEN_FILE.read_bytes()
    assert good_blocks(data, GOLDEN_NAMESPACE) == blocks_of(GOLDEN_RUN)
    golden, fresh = arrow_table(data), arrow_table(stored_bytes(GOLDEN_RUN, GOLDEN_NAMESPACE))
    assert golden["payload"].to_pylist() == [bytes(payload) for payload in GOLDEN_RUN.payloads]
    assert golden.equals(fresh)
    for key, value in golden.schema.metadata.items():
        is_place = key.endswith((b"_offset", b".pad", b".index_xxh3_64"))
        assert is_place or fresh.schema.metadata[key] == value


def test_a_compressed_object_of_this_version_stays_readable() -> None:
    """Newer versions of zstd may compress otherwise, so only what comes out is compared."""
    data = GOLDEN_COMPRESSED_FILE.read_bytes()
    assert good_blocks(data, replace(NAMESPACE, layout=NUMBERS)) == blocks_of(mixed_run(4))


def test_an_object_of_the_version_before_is_foreign() -> None:
    data = OLD_VERSION_FILE.read_bytes()
    assert arrow_table(data).schema.metadata[b"kvcommons.format"] == b"1"
    with pytest.raises(ForeignBlockError):
        good_blocks(data, replace(GOLDEN_NAMESPACE, format_version=1))


class TestCompressed:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
    def test_blocks_come_back_and_those_that_do_not_shrink_are_stored_as_they_are(
        self, dtype: str
    ) -> None:
        layout = replace(NUMBERS, dtype=dtype)
        namespace, run = replace(NAMESPACE, layout=layout), mixed_run(7, layout)
        encoded = codec.encode(namespace, run, SHUFFLE_ZSTD)
        data = b"".join(encoded.parts)
        assert good_blocks(data, namespace) == blocks_of(run)
        assert codec.parse_head(data, namespace) == encoded.index
        assert len(encoded.head) % 4096 == 0
        sizes = [payload.nbytes for payload in encoded.payloads]
        assert [size == layout.block_bytes for size in sizes] == [row % 3 == 2 for row in range(7)]
        assert all(a is b for a, b in zip(encoded.payloads[2::3], run.payloads[2::3], strict=True))

    def test_numbers_shrink_more_for_being_shuffled(self) -> None:
        """Else the bytes of the numbers have been put in a wrong order."""
        noise = np.random.default_rng(1).integers(0, 256, 1 << 15, "<u2")
        block = memoryview((noise | 0x3F00).astype("<u2").tobytes())
        assert compress(block, 2).nbytes < 0.52 * block.nbytes < compress(block, 1).nbytes

    def test_it_is_an_arrow_file_that_says_its_codec(self) -> None:
        namespace, run = replace(NAMESPACE, layout=NUMBERS), mixed_run(5)
        encoded = codec.encode(namespace, run, SHUFFLE_ZSTD)
        table = arrow_table(b"".join(encoded.parts))
        assert table.schema.metadata[b"kvcommons.codec"] == b"shuffle-zstd"
        assert table.schema.types[-1] == pa.large_binary()
        assert table["payload"].to_pylist() == [bytes(payload) for payload in encoded.payloads]
        assert table["stored_bytes"].to_pylist() == [p.nbytes for p in encoded.payloads]
        assert table["hash"].to_pylist() == list(run.hashes)
        table.validate(full=True)

    def test_no_changed_byte_yields_a_wrong_block(self) -> None:
        layout = BlockLayout(1, 1, 1, 8, 16, "float16")
        namespace, run = replace(NAMESPACE, layout=layout), mixed_run(3, layout)
        data, truth = stored_bytes(run, namespace, SHUFFLE_ZSTD), blocks_of(run)
        num_lost = 0
        for position in range(len(data)):
            changed = bytearray(data)
            changed[position] ^= 0x41
            try:
                found = good_blocks(bytes(changed), namespace)
            except BlockFormatError:
                continue
            assert found.items() <= truth.items()
            num_lost += found != truth
        assert num_lost > sum(codec.parse_head(data, namespace).ends[-1:]) * 0.9

    def test_a_codec_that_this_program_does_not_know_is_foreign(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        namespace = replace(NAMESPACE, layout=NUMBERS)
        data = stored_bytes(mixed_run(2), namespace, SHUFFLE_ZSTD)
        monkeypatch.setattr(codec, "CODEC_NAMES", ("none",))
        with pytest.raises(ForeignBlockError, match="shuffle-zstd"):
            good_blocks(data, namespace)

    def test_sizes_that_no_block_can_have_are_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only another program could write this: the index checksum is right."""
        namespace = replace(NAMESPACE, layout=NUMBERS)
        too_long = memoryview(bytes(NUMBERS.block_bytes + 1))
        monkeypatch.setattr(codec, "compress", lambda block, element_bytes: too_long)
        data = stored_bytes(mixed_run(2), namespace, SHUFFLE_ZSTD)
        with pytest.raises(CorruptBlockError, match="no block can have"):
            good_blocks(data, namespace)

    def test_a_wrong_name_of_a_codec_is_refused_with_those_that_are_known(self) -> None:
        with pytest.raises(ConfigError, match="write one of none, shuffle-zstd"):
            check_codec("lz4")


def test_no_changed_byte_yields_a_wrong_block() -> None:
    data, truth = stored_bytes(SMALL), blocks_of(SMALL)
    outcomes = {"refused": 0, "a block lost": 0, "harmless": 0}
    for position in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[position] ^= mask
            try:
                found = good_blocks(bytes(changed))
            except BlockFormatError:
                outcomes["refused"] += 1
                continue
            assert found.items() <= truth.items()
            outcomes["harmless" if found == truth else "a block lost"] += 1
    assert outcomes["a block lost"] == 3 * 2 * NAMESPACE.layout.block_bytes
    assert all(outcomes.values())


def test_no_cut_yields_a_wrong_block() -> None:
    data, truth = stored_bytes(SMALL), blocks_of(SMALL)
    head_bytes, size = 4096, NAMESPACE.layout.block_bytes
    for length in range(len(data)):
        if length < head_bytes:
            with pytest.raises(CorruptBlockError):
                good_blocks(data[:length])
        else:
            num_whole = min(2, (length - head_bytes) // size)
            assert good_blocks(data[:length]) == dict(list(truth.items())[:num_whole])


@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_are_refused(noise: bytes, like_arrow: bool) -> None:
    data = stored_bytes(SMALL)[:16] + noise if like_arrow else noise
    with pytest.raises(BlockFormatError):
        good_blocks(data)


@pytest.mark.parametrize(
    "other",
    [
        replace(NAMESPACE, model="other"),
        replace(NAMESPACE, tp_rank=1),
        replace(NAMESPACE, layout=replace(NAMESPACE.layout, dtype="bfloat16", head_dim=8)),
    ],
)
def test_another_namespace_is_foreign(other: Namespace) -> None:
    with pytest.raises(ForeignBlockError, match="another namespace"):
        good_blocks(stored_bytes(SMALL, other))


def test_another_version_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored_bytes(SMALL)
    monkeypatch.setattr(codec, "FORMAT_VERSION", 3)
    with pytest.raises(ForeignBlockError, match="this program reads 3"):
        good_blocks(data)


def test_somebody_elses_arrow_file_is_foreign() -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"hash": [b"x"]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ForeignBlockError):
        good_blocks(sink.getvalue().to_pybytes())


def test_a_long_head_says_how_long_it_is() -> None:
    run = run_of(chain_of(700))
    data = stored_bytes(run)
    needed = codec.bytes_needed(data[: codec.FIRST_READ_BYTES])
    assert needed > codec.FIRST_READ_BYTES
    assert codec.parse_head(data[:needed], NAMESPACE).hashes == run.hashes
    with pytest.raises(CorruptBlockError):
        codec.parse_head(data[: needed - 1], NAMESPACE)


def test_a_long_name_of_a_model_is_asked_for_in_two_steps() -> None:
    namespace = replace(NAMESPACE, model="m" * 3 * codec.FIRST_READ_BYTES)
    data = stored_bytes(SMALL, namespace)
    start = data[: codec.FIRST_READ_BYTES]
    steps = 0
    while (needed := codec.bytes_needed(start)) > len(start):
        start, steps = data[:needed], steps + 1
    assert steps == 2
    assert codec.parse_head(start, namespace).hashes == SMALL.hashes


def test_good_bytes_under_a_wrong_name_fail() -> None:
    index = codec.encode(NAMESPACE, SMALL).index
    payload = SMALL.payloads[0]
    assert codec.verify(payload, SMALL.hashes[0], index.checksums[0])
    assert not codec.verify(payload, SMALL.hashes[1], index.checksums[0])


def test_blocks_that_are_not_consecutive_are_refused() -> None:
    """Only another program could write this: the index checksum is right."""
    encoded, other = codec.encode(NAMESPACE, SMALL), run_of(chain_of(2, first_token=90)).hashes
    changed = bytearray(encoded.head)
    fields = codec._fields(encoded.head)
    parent_offset = int(fields["parent_offset"])
    changed[parent_offset + 32 : parent_offset + 64] = other[0]
    columns = {
        name: bytes(changed[int(fields[f"{name}_offset"]) :][: 2 * width])
        for name, width in INDEX_COLUMNS.items()
    }
    old, new = fields["index_xxh3_64"], codec._index_checksum(fields, columns)
    with pytest.raises(CorruptBlockError, match="not consecutive"):
        codec.parse_head(bytes(changed).replace(old, new), NAMESPACE)


@pytest.mark.parametrize("digits", [b"9" * 20, b"00000000000068719476", b"0" * 20])
def test_an_unbelievable_head_is_not_asked_for(digits: bytes) -> None:
    data = stored_bytes(SMALL).replace(b"00000000000000004096", digits)
    with pytest.raises(CorruptBlockError, match="not believable"):
        codec.bytes_needed(data)


@pytest.mark.parametrize(
    "run",
    [
        BlockRun(SMALL.parent, (), ()),
        replace(SMALL, payloads=(SMALL.payloads[0], SMALL.payloads[1][:-1])),
        replace(SMALL, hashes=(SMALL.hashes[0], BlockHash(b"short"))),
        replace(SMALL, parent=BlockHash(b"")),
    ],
    ids=["empty", "payload", "hash", "parent"],
)
def test_a_run_that_cannot_be_stored_is_refused(run: BlockRun) -> None:
    with pytest.raises(ValueError, match="block"):
        codec.encode(NAMESPACE, run)
