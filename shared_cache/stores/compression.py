"""The codecs of stored blocks: none, and byte shuffle with zstd for links slower than one core.

The bytes of floating-point numbers are ordered before they are compressed: first the low bytes of
all numbers, which look random, then the next ones, up to those with the exponents, which repeat.
Without that zstd finds little to do. A block that does not shrink is stored as it is. Failure
prevented: trusting what was decompressed. The checksum of a block is over its own bytes, whatever
the codec, and is checked after decoding.
"""

from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shared_cache.errors import ConfigError

CodecName = Literal["none", "shuffle-zstd"]
CodecSetting = Literal["none", "shuffle-zstd", "auto"]

PLAIN: CodecName = "none"
SHUFFLE_ZSTD: CodecName = "shuffle-zstd"
CODEC_NAMES: tuple[str, ...] = get_args(CodecName)
CODEC_SETTINGS: tuple[str, ...] = get_args(CodecSetting)

_ZSTD_LEVEL = 1


def check_codec(name: str) -> None:
    """Raise `ConfigError` unless `name` is a setting that can be used here."""
    if name not in CODEC_SETTINGS:
        raise ConfigError(f"codec {name!r} is unknown; write one of {', '.join(CODEC_SETTINGS)}")
    if name == SHUFFLE_ZSTD and not can_compress():
        raise ConfigError(f"codec {name}: this pyarrow is built without zstd; write codec: none")


def can_compress() -> bool:
    """Whether this pyarrow can write what is compressed."""
    return bool(pa.Codec.is_available("zstd"))


def compress(block: memoryview, element_bytes: int) -> memoryview:
    """`block`, a whole number of elements, in its stored form: itself if that is no shorter."""
    planes = _shuffled(block, element_bytes)
    codec: Any = pa.Codec("zstd", compression_level=_ZSTD_LEVEL)
    stored = memoryview(codec.compress(pa.py_buffer(planes)))
    return stored if stored.nbytes < block.nbytes else block


def decompress(stored: memoryview, element_bytes: int, buffer: memoryview) -> bool:
    """Fill `buffer` with the block that `stored` came from; False when that is damaged."""
    num_bytes = buffer.nbytes
    if stored.nbytes == num_bytes:
        buffer.cast("B")[:] = stored
        return True
    try:
        planes = pa.Codec("zstd").decompress(pa.py_buffer(stored), num_bytes)
    except (pa.ArrowException, OSError):
        return False
    _unshuffle(np.frombuffer(planes, np.uint8), element_bytes, buffer)
    return True


def _shuffled(block: memoryview, element_bytes: int) -> NDArray[np.uint8]:
    if element_bytes == 1:
        return np.frombuffer(block, np.uint8)
    numbers = np.frombuffer(block, f"<u{element_bytes}")
    planes = np.empty((element_bytes, numbers.size), np.uint8)
    for index, plane in enumerate(planes):
        np.right_shift(numbers, 8 * index, out=plane, casting="unsafe", dtype=numbers.dtype)
    return planes


def _unshuffle(planes: NDArray[np.uint8], element_bytes: int, buffer: memoryview) -> None:
    if element_bytes == 1:
        np.frombuffer(buffer, np.uint8)[:] = planes
        return
    numbers = np.frombuffer(buffer, f"<u{element_bytes}")
    rows = planes.reshape(element_bytes, -1)
    np.left_shift(rows[-1], 8, out=numbers, dtype=numbers.dtype)
    for row in rows[-2:0:-1]:
        np.bitwise_or(numbers, row, out=numbers)
        np.left_shift(numbers, 8, out=numbers)
    np.bitwise_or(numbers, rows[0], out=numbers)
