"""What clients and the owner of an arena say to each other.

Frames over a Unix socket: four bytes of length, then one msgpack array of known fields, never a
pickle: a message can hold wrong numbers, but it cannot run anything. Block hashes travel as one
string of bytes, as a prompt has thousands of them.

A client speaks first, with `Attach`; the owner answers `Welcome` or `Refused`. After that every
request is answered once, with the number it came with; a `Notice` is not answered.
"""

from collections.abc import Iterator, Sequence

import msgspec

from shared_cache.hashing import HASH_BYTES, BlockHash
from shared_cache.host.interface import HostStats
from shared_cache.host.terms import StoreAdmission

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 16 << 20
_LENGTH_BYTES = 4


class Message(msgspec.Struct, array_like=True, forbid_unknown_fields=False):
    """Base of all messages; their fields travel in order, after the name of the message."""


class Knock(Message, tag="attach"):
    """The beginning of every version's `Attach`; never changes."""

    version: int


class Attach(Message, tag="attach"):
    """A client begins: `holder` is its own number, the name of its locked file.

    A client that had another connection says what it holds of the arena `boot`: the slots that it
    has leased, each once, those that it has reserved, and the hashes of the leased blocks.
    """

    version: int
    holder: int
    namespace: str
    block_bytes: int
    boot: bytes = b""
    leased: list[int] = []
    reserved: list[int] = []
    hashes: bytes = b""


class Request(Message):
    """Base of what is answered; `id` is set when it is sent."""

    id: int


class Lease(Request, tag="lease"):
    """See `HostTier.lease`; answered by `Granted`."""

    hashes: bytes
    first: int


class Claim(Request, tag="claim"):
    """See `HostTier.claim`; answered by `Claimed`, at the latest after `wait_s`."""

    hashes: bytes
    wait_s: float


class Reserve(Request, tag="reserve"):
    """More slots for the stock of a client that has `num_had`; answered by `Reserved`."""

    num_slots: int
    num_had: int = 0


class Commit(Request, tag="commit"):
    """See `HostTier.commit`; answered by `Granted`. Checksums have 8 bytes each."""

    slots: list[int]
    parent: bytes
    hashes: bytes
    checksums: bytes
    tenant: bytes
    is_stored: bool
    priority: int
    ttl_s: float | None


class Pin(Request, tag="pin"):
    """See `HostTier.pin`; answered by `Count`."""

    hashes: bytes
    ttl_s: float


class Drop(Request, tag="drop"):
    """Forget damaged blocks where they are not leased; answered by `Count`."""

    hashes: bytes


class GetInUse(Request, tag="get in use"):
    """Which of these blocks are leased, or were asked for lately; answered by `InUse`."""

    hashes: bytes


class GetStats(Request, tag="stats"):
    """Answered by `Stats`."""


class GetEvents(Request, tag="events"):
    """What happened to blocks of the namespace from number `since` on; answered by `Events`."""

    since: int


class Notice(Message, tag="notice"):
    """What a client has ended: leases (a slot for each), reservations, duties to store."""

    released: list[int] = []
    cancelled: list[int] = []
    stored: bytes = b""
    not_stored: bytes = b""


class Welcome(Message, tag="welcome"):
    """The client is attached to the arena `boot`.

    Of what it said it held, `lost` are leased slots that hold no block; they are reserved for it
    now, so that nobody writes there while it reads. Those in `refused` are not its own.
    `admission` and `arena_bytes` are the owner's settings, which count.
    """

    boot: bytes
    arena_bytes: int
    admission: StoreAdmission
    lost: list[int] = []
    refused: list[int] = []


class Refused(Message, tag="refused"):
    """The client is not attached, and why; never changes."""

    reason: str


class Reply(Message):
    """Base of the answers to a `Request`, whose `id` they carry."""

    id: int


class Granted(Reply, tag="granted"):
    """A lease."""

    slots: list[int]
    to_store: list[int] = []
    num_from_peers: int = 0


class Claimed(Reply, tag="claimed"):
    """A lease on `slots` and reserved slots for the blocks behind it."""

    slots: list[int]
    to_store: list[int]
    num_from_peers: int
    reserved: list[int]
    is_coming: bool


class Reserved(Reply, tag="reserved"):
    """Reserved slots, perhaps fewer than were asked for.

    The stock may have `share` slots from now on; what it has above that is to be given back.
    """

    slots: list[int]
    share: int = 0


class Count(Reply, tag="count"):
    """So many blocks."""

    num_blocks: int


class InUse(Reply, tag="in use"):
    """The blocks at these positions of the request are in use."""

    positions: list[int]


class Stats(Reply, tag="counts"):
    """The counts of the client's namespace."""

    stats: HostStats


class Events(Reply, tag="happened"):
    """Events numbered from `first` on: a first one after `since` means that some are forgotten.

    `kinds[i]` is the number of an `EventKind`, for the block `hashes[i]`; `next` is where to go on.
    Numbers of other namespaces' events are left out.
    """

    first: int
    next: int
    kinds: bytes
    hashes: bytes


ClientMessage = (
    Attach
    | Lease
    | Claim
    | Reserve
    | Commit
    | Pin
    | Drop
    | GetInUse
    | GetStats
    | GetEvents
    | Notice
)
OwnerMessage = Welcome | Refused | Granted | Claimed | Reserved | Count | InUse | Stats | Events

_encoder = msgspec.msgpack.Encoder()
client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
owner_decoder: msgspec.msgpack.Decoder[OwnerMessage] = msgspec.msgpack.Decoder(OwnerMessage)
knock_decoder: msgspec.msgpack.Decoder[Knock] = msgspec.msgpack.Decoder(Knock)


class FrameError(ValueError):
    """The other side does not speak this protocol."""


def encode_frame(message: Message) -> bytes:
    """A message with its length; raises `FrameError` for one that no owner takes."""
    buffer = bytearray(_LENGTH_BYTES)
    _encoder.encode_into(message, buffer, _LENGTH_BYTES)
    num_bytes = len(buffer) - _LENGTH_BYTES
    if num_bytes > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {num_bytes} bytes is too long")
    buffer[:_LENGTH_BYTES] = num_bytes.to_bytes(_LENGTH_BYTES, "little")
    return bytes(buffer)


class FrameReader:
    """Cuts a stream of bytes into the bodies of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """The frames that are complete with `data`; raises `FrameError` for one that is too long.

        To be iterated to its end before the next call.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            num_bytes = int.from_bytes(buffer[start:body], "little")
            if num_bytes > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {num_bytes} bytes is too long")
            if len(buffer) - body < num_bytes:
                break
            start = body + num_bytes
            yield bytes(buffer[body:start])
        del buffer[:start]


def pack_hashes(hashes: Sequence[BlockHash]) -> bytes:
    """The hashes as one string of bytes."""
    return b"".join(hashes)


def unpack_hashes(packed: bytes) -> list[BlockHash]:
    """The inverse of `pack_hashes`; raises `FrameError` if the last hash is cut short."""
    if len(packed) % HASH_BYTES:
        raise FrameError(f"{len(packed)} bytes are no block hashes of {HASH_BYTES}")
    return [
        BlockHash(packed[start : start + HASH_BYTES]) for start in range(0, len(packed), HASH_BYTES)
    ]
