"""One client's connection, as the owner of an arena has it: credentials, frames, order of messages.

Whatever comes in is somebody else's mistake at worst: it ends that one connection, is logged once,
and everybody else goes on.
"""

import asyncio
import logging
import os
import socket
import struct
from typing import cast

import msgspec

from shared_cache.faults import FaultLog
from shared_cache.host import protocol as wire
from shared_cache.host.roster import Roster
from shared_cache.host.service import Service

logger = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 32 << 20
"""A client that does not read so many bytes of answers is cut off."""

_CREDENTIALS = struct.Struct("3i")


class ClientSocket(asyncio.Protocol):
    """Reads a client's messages and hands them on, once it is known and attached."""

    def __init__(self, service: Service, roster: Roster, faults: FaultLog) -> None:
        self.holder = 0
        self.namespace = -1
        self._service = service
        self._roster = roster
        self._faults = faults
        self._frames = wire.FrameReader()
        self._transport: asyncio.Transport | None = None
        self._has_knocked = False
        self._is_attached = False
        self._has_ended = False

    @property
    def is_open(self) -> bool:
        """Whether messages may still come and go; True before they can."""
        return not self._has_ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let nobody in but this user."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(MAX_UNREAD_BYTES)
        raw = transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        _, user, _ = _CREDENTIALS.unpack(raw)
        if user != os.geteuid():
            self._cut_off(f"user {user} has no business here")

    def data_received(self, data: bytes) -> None:
        """Handle the messages that are complete now."""
        try:
            for frame in self._frames.feed(data):
                if not self._has_ended:
                    self._handle(frame)
        except (ValueError, msgspec.DecodeError) as error:
            self._cut_off(str(error))

    def pause_writing(self) -> None:
        """Too much was sent that nobody read."""
        self._cut_off("does not read its answers")

    def connection_lost(self, error: Exception | None) -> None:
        """The other side has gone, or was cut off."""
        self._has_ended = True
        self._service.forget(self)
        if self._has_knocked:
            self._roster.ended(self)

    def send(self, message: wire.Message) -> None:
        """See `Client.send`."""
        if self._transport is None or self._has_ended:
            return
        if isinstance(message, wire.Welcome):
            self._is_attached = True
        self._transport.write(wire.encode_frame(message))

    def end(self) -> None:
        """See `Client.end`."""
        self._has_ended = True
        self._service.forget(self)
        if self._transport is not None:
            self._transport.close()

    def _handle(self, frame: bytes) -> None:
        if self._is_attached:
            self._service.handle(self, wire.client_decoder.decode(frame))
        elif self._has_knocked:
            raise ValueError("a message before the answer to the first one")
        else:
            self._knock(frame)

    def _knock(self, frame: bytes) -> None:
        version = wire.knock_decoder.decode(frame).version
        if version != wire.PROTOCOL_VERSION:
            self.send(
                wire.Refused(
                    f"the owner of this node's arena speaks version {wire.PROTOCOL_VERSION}, this "
                    f"process version {version}: stop all processes of the older version, or set "
                    "cache.host.name to another arena"
                )
            )
            self.end()
            return
        message = wire.client_decoder.decode(frame)
        if not isinstance(message, wire.Attach) or message.holder < 1:
            raise ValueError("the first message must be `Attach`, with a number above 0")
        self.holder = message.holder
        self._has_knocked = True
        self._roster.attach(self, message)

    def _cut_off(self, why: str) -> None:
        self._faults.record(f"client {self.holder:x} is cut off: {why}")
        self._has_ended = True
        self._service.forget(self)
        if self._transport is not None:
            self._transport.abort()
