"""Who uses an arena: clients come, come back with what they hold, and die.

A client's connection may end while the client lives on and reads what it has leased. So the end of
a connection ends nothing by itself: only the client's death does, which its locked file tells. And
a client that comes back says itself what it holds, be the owner the same one or a new one.
"""

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from shared_cache.errors import ConfigError
from shared_cache.host import protocol as wire
from shared_cache.host.adoption import Adoption
from shared_cache.host.arena import OwnedArena, host_bytes_for
from shared_cache.host.folder import ArenaPaths, WatchedFile, is_locked, remove_if_unlocked
from shared_cache.host.index import HostIndex
from shared_cache.host.journal import ArenaJournal, EventRing
from shared_cache.host.protocol import unpack_hashes
from shared_cache.host.record_format import ReservedRecord, UsedRecord
from shared_cache.host.terms import StoreAdmission

logger = logging.getLogger(__name__)


class Client(Protocol):
    """A connection, as the owner's parts see it."""

    holder: int
    namespace: int

    def send(self, message: wire.Message) -> None:
        """Send one message; nothing happens if the connection has ended."""

    def end(self) -> None:
        """Close the connection after what was sent."""


@dataclass(frozen=True, slots=True)
class ArenaState:
    """What the owner has of one arena; `admission` is its rule for the shared tier."""

    paths: ArenaPaths
    arena: OwnedArena
    index: HostIndex
    journal: ArenaJournal
    events: EventRing
    admission: StoreAdmission


class Roster:
    """The clients of one arena; used by the owner's event loop alone."""

    def __init__(
        self,
        state: ArenaState,
        adoption: Adoption | None,
        living: Collection[int],
        on_freed: Callable[[], None],
    ) -> None:
        """`living` are clients of the old owner, which may come back.

        `on_freed` is called when a client's reservations may have ended.
        """
        self._state = state
        self._adoption = adoption
        self._on_freed = on_freed
        self._clients: dict[int, Client] = {}
        self._away = set(living)
        self._files: dict[int, WatchedFile] = {}
        for holder in living:
            self._watch(holder)

    @property
    def num_clients(self) -> int:
        """Clients that are connected, or live on without a connection."""
        return len(self._clients) + len(self._away)

    @property
    def is_any_away(self) -> bool:
        """Whether `look_after_dead` has somebody to look after."""
        return bool(self._away)

    def attach(self, client: Client, message: wire.Attach) -> None:
        """Let a client in, with what it holds, or tell it why not.

        Answers later if something that it holds has not been checked since a restart.
        """
        try:
            client.namespace = self._open_namespace(message)
        except (ConfigError, ValueError) as error:
            client.send(wire.Refused(str(error)))
            client.end()
            return
        former = self._clients.get(message.holder)
        is_known = former is not None or message.holder in self._away
        self._clients[message.holder] = client
        self._watch(message.holder)
        self._away.discard(message.holder)
        if former is not None:
            former.end()
        if self._adoption is None or message.boot != self._state.arena.boot:
            self._let_in(client, message, is_known)
        else:
            held = (*message.leased, *message.reserved)
            self._adoption.when_checked(held, lambda: self._let_in(client, message, is_known))

    def ended(self, client: Client) -> None:
        """A connection has ended; what its client holds ends now if it is dead, else when it is."""
        if self._clients.get(client.holder) is client:
            del self._clients[client.holder]
            self._away.add(client.holder)
            self.look_after_dead()

    def look_after_dead(self) -> None:
        """End what clients held that were away and have died; to be called now and then."""
        dead = [holder for holder in self._away if not self._is_alive(holder)]
        for holder in dead:
            self._away.discard(holder)
            remove_if_unlocked(self._state.paths.client(holder))
            watched = self._files.pop(holder, None)
            if watched is not None:
                watched.close()
            self._state.index.detach(holder)
            if self._adoption is not None:
                self._adoption.returned(holder)
        if dead:
            self._on_freed()

    def _open_namespace(self, message: wire.Attach) -> int:
        block_bytes = message.block_bytes
        extent_bytes = self._state.arena.geometry.extent_bytes
        if not 0 < block_bytes <= extent_bytes:
            raise ConfigError(
                f"a block of this model takes {block_bytes} bytes, more than an extent of the "
                f"node's arena ({extent_bytes}): set cache.host.bytes to "
                f"{host_bytes_for(block_bytes)} or more (and stop the running owner once), or "
                "lower the tokens per block"
            )
        index, records = self._state.index, self._state.arena.records
        known = records.namespaces()
        if any(fingerprint == message.namespace for fingerprint, _ in known):
            return index.open_namespace(message.namespace, block_bytes)
        number = len(known)  # noted first: the index must know none that the records do not
        records.set_namespace(number, message.namespace, block_bytes)
        try:
            return index.open_namespace(message.namespace, block_bytes)
        except (ConfigError, ValueError):
            records.forget_namespace(number)
            raise

    def _is_alive(self, holder: int) -> bool:
        """Whether a client without a connection lives; if it cannot be told, it does."""
        watched = self._files.get(holder)
        try:
            if watched is not None:
                return watched.is_locked()
            return is_locked(self._state.paths.client(holder))
        except OSError as error:
            logger.debug("client %x: %s", holder, error)
            return True

    def _watch(self, holder: int) -> None:
        """Look at the file that a client has now, be it removed later or not."""
        former = self._files.pop(holder, None)
        if former is not None:
            former.close()
        with suppress(OSError):  # then it lives as long as its connection
            self._files[holder] = WatchedFile(self._state.paths.client(holder))

    def close(self) -> None:
        """Look after nobody any more."""
        while self._files:
            self._files.popitem()[1].close()

    def _let_in(self, client: Client, message: wire.Attach, is_known: bool) -> None:
        """As `_take_back`; whatever is wrong with the message ends this client alone."""
        if self._clients.get(client.holder) is not client:
            return  # it left while its blocks were being checked
        try:
            self._take_back(client, message, is_known)
        except Exception:
            logger.exception("client %x is cut off: what it says it holds is wrong", client.holder)
            client.end()

    def _take_back(self, client: Client, message: wire.Attach, is_known: bool) -> None:
        """Give a client what it held before, and end the rest of it, in one step.

        Of a client whose end was noticed before it came back, nothing counts: it is all refused.
        """
        index, holder = self._state.index, client.holder
        is_same_arena = message.boot == self._state.arena.boot
        if is_same_arena and is_known:
            leased, foreign = self._leased_as_said(client, message)
            reserved = list(dict.fromkeys(message.reserved))
        else:
            leased, reserved = [], []
            foreign = [*message.leased, *message.reserved] if is_same_arena else []
        kept = [slot for slot in reserved if self._is_reserved(slot, holder)]
        with self._state.journal.keeping(frozenset(kept)):
            index.detach(holder)
            index.attach(holder, client.namespace)
            for slot in kept:
                index.adopt_reserved(slot, holder)
        found = index.adopt_lease(holder, client.namespace, leased)
        missing = set(leased).difference(found)
        lost = [slot for slot in missing if self._hand_over(slot, holder)]
        others = set(reserved).difference(kept)
        refused = [slot for slot in others if not self._hand_over(slot, holder)]
        refused.extend(missing.difference(lost))
        refused.extend(foreign)
        if self._adoption is not None:
            self._adoption.returned(holder)
        arena = self._state.arena
        welcome = (arena.boot, arena.geometry.arena_bytes, self._state.admission)
        client.send(wire.Welcome(*welcome, lost, refused))
        self._on_freed()

    def _leased_as_said(self, client: Client, message: wire.Attach) -> tuple[list[int], list[int]]:
        """The slots that a client may have leased, and those that hold another block than it says.

        Raises `ValueError` for a message without all hashes.
        """
        hashes = unpack_hashes(message.hashes)
        said = dict(zip(message.leased, hashes, strict=True))
        records = self._state.arena.records
        found: list[int] = []
        foreign: list[int] = []
        for slot, block_hash in said.items():
            record = records.read(slot) if records.is_slot(slot) else None
            is_other = isinstance(record, UsedRecord) and (
                record.namespace != client.namespace or record.block.block_hash != block_hash
            )
            (foreign if is_other else found).append(slot)
        return found, foreign

    def _hand_over(self, slot: int, holder: int) -> bool:
        return self._adoption is not None and self._adoption.hand_over(slot, holder)

    def _is_reserved(self, slot: int, holder: int) -> bool:
        records = self._state.arena.records
        return records.is_slot(slot) and records.read(slot) == ReservedRecord(holder)
