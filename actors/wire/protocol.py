"""What a caller and a replica say to each other on their socket.

Frames are a length (4 bytes, little-endian) and a msgpack message. Requests of one caller share one
connection and are told apart by a number that the caller chooses.
"""

from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from actors.engine import GenerationRequest, TokenChunk

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 64 << 20
MAX_HELLO_BYTES = 128
"""Of what is read of a caller that has not shown yet that it may ask."""


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """The first message of a caller: it knows the replica's secret."""

    secret: bytes


class Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """Generate this."""

    number: int
    request: GenerationRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """Nobody waits for this any more."""

    number: int


class Came(msgspec.Struct, frozen=True, tag="came", array_like=True):
    """A chunk of a request; the last one of a request that ends well carries a finish reason."""

    number: int
    chunk: TokenChunk


class Ended(msgspec.Struct, frozen=True, tag="ended", array_like=True):
    """No more comes. `error` names the class of an error that ended it, of ours or any other."""

    number: int
    error: str | None = None
    text: str = ""


ToReplica: TypeAlias = Hello | Ask | Cancel
ToCaller: TypeAlias = Came | Ended

_encoder = msgspec.msgpack.Encoder()
to_replica = msgspec.msgpack.Decoder(ToReplica)
to_caller = msgspec.msgpack.Decoder(ToCaller)


def frame(message: ToReplica | ToCaller) -> bytes:
    """The bytes of one message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


class Frames:
    """Cuts what comes in into messages' bytes, each of `max_bytes` at most."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete now; raises `ValueError` for one that is too long.

        Take each in before the next: it may change `max_bytes`.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= LENGTH_BYTES:
            length = int.from_bytes(buffer[start : start + LENGTH_BYTES], "little")
            if length > self.max_bytes:
                raise ValueError(f"a message of {length} bytes; at most {self.max_bytes}")
            end = start + LENGTH_BYTES + length
            if end > len(buffer):
                break
            yield bytes(buffer[start + LENGTH_BYTES : end])
            start = end
        del buffer[:start]
