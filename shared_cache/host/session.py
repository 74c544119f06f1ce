"""A process's standing with the owner of the node's arena: attached, away, attached again.

Whatever happens to the owner, this process knows what it holds. It says so when it attaches again,
to the same owner or to the next one; what was granted over a connection that has ended since counts
for nothing. If there is another arena then, the old one stays mapped until nobody reads it.
"""

import logging
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import register_at_fork

import msgspec

from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError
from shared_cache.faults import FaultLog
from shared_cache.host import protocol as wire
from shared_cache.host.arena import geometry_for
from shared_cache.host.arena_reader import ArenaReader
from shared_cache.host.connection import AwayError, OwnerLink
from shared_cache.host.folder import ArenaPaths, ClientFile
from shared_cache.host.holdings import Holdings, Stock
from shared_cache.host.mapping import ExtentWatch, MappedArena
from shared_cache.host.protocol import pack_hashes
from shared_cache.host.starting import START_TIMEOUT_S, connect_to_owner, start_owner, try_connect
from shared_cache.host.stocks import STOCK_PART
from shared_cache.host.terms import StoreAdmission
from shared_cache.readers.memory import OutsideBuffers, add_mapped

logger = logging.getLogger(__name__)

RESERVE_AHEAD = 64
"""Slots reserved ahead where nobody knows what a turn fills."""

ATTACH_TIMEOUT_S = 60.0
"""An owner that has just been restarted checks what we have leased before it answers."""

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
STOCK_TIMEOUT_S = 1.0
CLOSE_TIMEOUT_S = 2.0

_CONNECTION_ERRORS = (OSError, ValueError, msgspec.DecodeError)
_sessions: "weakref.WeakSet[OwnerSession]" = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """Which arena a process uses, and for what."""

    paths: ArenaPaths
    config: HostConfig
    namespace: str
    block_bytes: int
    admission: StoreAdmission


class OwnerSession:
    """The link to the owner, the mapped arenas (the current one first) and what is held of them.

    `lock` guards `link`, `arenas`, `holdings` and `stock`; it is held for moments only.
    """

    def __init__(self, terms: SessionTerms, extents: ExtentWatch, faults: FaultLog) -> None:
        self.lock = threading.Lock()
        self.link: OwnerLink | None = None
        self.arenas: list[MappedArena] = []
        self.holdings = Holdings()
        self.stock = Stock(terms.config.reserve_ahead or RESERVE_AHEAD, time.monotonic)
        self.extents = extents
        self._terms = terms
        self._faults = faults
        self._holder = secrets.randbits(62) + 1
        self._file = ClientFile(terms.paths.client(self._holder))
        self._reader = ArenaReader(terms.config)
        self._closing = threading.Event()
        self._has_stock = threading.Event()
        self._thread = threading.Thread(target=self._stay_attached, name="kvcommons-host")
        self._thread.daemon = True

    @property
    def is_populated(self) -> bool:
        """Whether all memory is to be taken at start."""
        return self._terms.config.populate

    def open(self) -> None:
        """Attach for the first time; waits up to `START_TIMEOUT_S`, then raises `ConfigError`."""
        terms, deadline_s = self._terms, time.monotonic() + START_TIMEOUT_S
        while True:
            connected = connect_to_owner(terms.paths, terms.config, terms.admission)
            try:
                self._attach(connected, START_TIMEOUT_S)
                break
            except _CONNECTION_ERRORS as error:  # the owner has just ended, perhaps
                if time.monotonic() > deadline_s:
                    raise ConfigError(f"the owner of {terms.paths.arena}: {error}") from error
        _sessions.add(self)
        if self._reader.may_start:
            add_mapped(self)
        self._thread.start()
        self._has_stock.wait(STOCK_TIMEOUT_S)

    def close(self) -> None:
        """End the session and everything that is held; a second one is a no-op."""
        self._closing.set()
        self._reader.close()
        self._file.leave()  # first, so that the owner takes the end of the connection for ours
        with self.lock:
            link = self.link
            self.holdings.arena_has_gone()
            self.stock.clear()
        if link is not None:
            link.flush(CLOSE_TIMEOUT_S)
            link.end()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        self._file.leave()  # made anew if it was attaching again just now
        self.extents.close()

    def outside(self, addresses: Sequence[int], num_bytes: int) -> OutsideBuffers | None:
        """See `MappedMemory.outside`; the reader process is started when it is first asked for."""
        return self._reader.find(self.arenas, addresses, num_bytes, self._file)

    def tell_ended(self, released: list[int], cancelled: list[int]) -> None:
        """Tell the owner which leases and reservations have ended; the lock is held."""
        if self.link is not None and (released or cancelled):
            self.link.tell(wire.Notice(self._wired(released), self._wired(cancelled)))
        if len(self.arenas) > 1:
            uses = self.holdings.uses
            others = [arena for arena in self.arenas[1:] if uses(arena.base, arena.end)]
            gone = [arena for arena in self.arenas[1:] if arena not in others]
            self.arenas = [self.arenas[0], *others]
            for arena in gone:
                self._reader.forget(arena)

    def _wired(self, slots: list[int]) -> list[int]:
        base = self.arenas[0].base
        return [slot - base for slot in slots] if base else slots

    def _stay_attached(self) -> None:
        while not self._closing.is_set():
            link = self.link
            if link is not None:
                with self._faults.caught("hearing the owner of the host tier"):
                    link.read()
                link.end()
            pause_s = SHORTEST_PAUSE_S
            while not self._closing.wait(pause_s) and not self._attach_again():
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _attach_again(self) -> bool:
        """Whether we are attached; whatever fails is tried again, as nobody else would."""
        with self._faults.caught("attaching to the owner of the host tier"):
            return self._try_to_attach()
        return False

    def _try_to_attach(self) -> bool:
        terms = self._terms
        try:
            connected = try_connect(terms.paths)
            if connected is None and terms.config.start_owner:
                if self._closing.is_set():
                    return False
                start_owner(terms.paths, terms.config, terms.admission)
                connected = try_connect(terms.paths)
            if connected is None:
                return False
            self._attach(connected, ATTACH_TIMEOUT_S)
        except (ConfigError, *_CONNECTION_ERRORS) as error:
            self._faults.record(f"the owner of {terms.paths.arena}: {error}")
            return False
        return True

    def _attach(self, connected: socket.socket, timeout_s: float) -> None:
        """Say what we hold, hear what of it counts, and go on with this connection.

        Raises `ConfigError` if the owner does not take us, and what connections raise.
        """
        link = OwnerLink(connected, self._on_tick)
        try:
            self._keep_file()
            with self.lock:
                message = self._introduce()
                self.link = link  # what ends from now on is told after the answer
            answer = link.exchange(message, timeout_s)
            if isinstance(answer, wire.Refused):
                raise ConfigError(answer.reason)
            if not isinstance(answer, wire.Welcome):
                raise wire.FrameError("not an answer to the first message")
            self._settle(link, answer)
            if self._closing.is_set():
                raise ConnectionAbortedError("closed meanwhile")
            link.start()
        except BaseException:
            link.end()
            raise

    def _keep_file(self) -> None:
        if self._file.keep():
            self._reader.show(self._file)

    def _introduce(self) -> wire.Attach:
        """What we hold, to be told; the stock is given up. The lock is held."""
        terms = self._terms
        self.stock.clear()
        leased, reserved, hashes = self.holdings.listing()
        boot = b""
        if self.arenas:
            boot, leased, reserved = self.arenas[0].boot, self._wired(leased), self._wired(reserved)
        about = (wire.PROTOCOL_VERSION, self._holder, terms.namespace, terms.block_bytes)
        return wire.Attach(*about, boot, leased, reserved, pack_hashes(hashes) if boot else b"")

    def _settle(self, link: OwnerLink, answer: wire.Welcome) -> None:
        """Take over what the owner says, be it of our arena or of another one."""
        terms = self._terms
        if self.arenas and self.arenas[0].boot == answer.boot:
            base = self.arenas[0].base
            with self.lock:
                self.holdings.refused([base + slot for slot in answer.refused])
                ended = self.holdings.lost([base + slot for slot in answer.lost])
                self.tell_ended([], ended)
            return
        arena = MappedArena.open(terms.paths, answer.boot, terms.block_bytes, self.arenas)
        with self.lock:
            link.forget_notices()
            self.holdings.arena_has_gone()
            self.stock.limit(arena.num_slots // STOCK_PART)
            self.arenas.insert(0, arena)
            self.tell_ended([], [])
        wanted_bytes = geometry_for(int(terms.config.bytes)).arena_bytes
        if (answer.arena_bytes, answer.admission) != (wanted_bytes, terms.admission):
            logger.warning(
                "the owner of %s runs with %d MiB and admission %s, which counts; configured here "
                "are %d MiB and %s",
                terms.paths.arena,
                answer.arena_bytes >> 20,
                answer.admission,
                wanted_bytes >> 20,
                terms.admission,
            )

    def _on_tick(self, link: OwnerLink) -> None:
        """Keep the stock as large as it should be, and our file where the owner looks for it."""
        with self.lock:
            if link is not self.link:
                return
            self.tell_ended([], self.stock.surplus())
            num_slots, num_had = self.stock.ask(), len(self.stock)
            is_asking = num_slots > 0 or self.stock.is_to_report()
        if is_asking:
            if not self._closing.is_set():
                with self._faults.caught("keeping the file that says that this process lives"):
                    self._keep_file()
            try:
                link.post(wire.Reserve(0, num_slots, num_had), partial(self._add_stock, link))
            except AwayError:
                self._add_stock(link, wire.Reserved(0, []))

    def _add_stock(self, link: OwnerLink, reply: wire.Reply) -> None:
        with self.lock:
            arena = self.arenas[0] if link is self.link else None
        if arena is None or not isinstance(reply, wire.Reserved):
            return  # what it brings ended with its connection
        slots = arena.numbered(reply.slots)
        self.extents.show(arena, slots)
        with self.lock:
            if link is self.link:
                self.stock.add(slots)
                if reply.share > 0:
                    self.stock.allow(reply.share)
                self.tell_ended([], self.stock.surplus())
        self._has_stock.set()

    def _abandon_in_child(self) -> None:
        """In a forked child: keep nothing by which the parent would seem to live on."""
        self.lock = threading.Lock()
        self._closing.set()
        self.holdings = Holdings()
        self.stock.clear()
        if self.link is not None:
            self.link.abandon_in_child()
        self._file.abandon_in_child()
        self._reader.abandon_in_child()


def _abandon_all_in_child() -> None:
    for session in list(_sessions):
        session._abandon_in_child()


register_at_fork(after_in_child=_abandon_all_in_child)
