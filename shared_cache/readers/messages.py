"""What a replica and its reader process say to each other; each message is one packet.

File descriptors travel beside them: a store's object may be replaced under its name at any moment.
"""

from typing import TypeAlias

import msgspec

MAX_MESSAGE_BYTES = 1 << 17

MAX_ROWS = 1024
"""Of one message: less than half of that, and of what a socket takes at once."""

GOOD = 1
"""The answer for a block that is there and verified; anything else is looked at by who asked."""

Row: TypeAlias = tuple[int, int, int, int, int]
"""A block's begin in the file and in the memory, its bytes, its checksum's seed, its checksum."""


class Message(msgspec.Struct, tag=True, array_like=True):
    """Any of them."""


class UseMemory(Message):
    """From now on `memory` is the file that comes with this; `populate`: map all pages now."""

    memory: int
    num_bytes: int
    populate: bool


class Forget(Message):
    """`memory` is not used any more."""

    memory: int


class Hold(Message):
    """Keep the file that comes with this open, instead of the one of the last such message.

    It is locked, and tells by that who still may write to the memory.
    """


class Read(Message):
    """Bring these blocks of the file that comes with this into `memory`, in order."""

    id: int
    memory: int
    rows: list[Row]


class Done(Message):
    """What became of each row: `GOOD` or not."""

    id: int
    results: bytes


class Ready(Message):
    """The process can be asked."""


ToReader: TypeAlias = UseMemory | Forget | Hold | Read
FromReader: TypeAlias = Done | Ready

encode = msgspec.msgpack.Encoder().encode
reader_decoder = msgspec.msgpack.Decoder(ToReader)
replica_decoder = msgspec.msgpack.Decoder(FromReader)
