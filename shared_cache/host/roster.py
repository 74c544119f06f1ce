"""Who uses an arena: clients come, come back with what they hold, and die.

A client's connection may end while the client lives on and reads what it has leased. So the end of
a connection ends nothing by itself: only the client's death does, which its locked file tells. And
a client that comes back says itself what it holds, be the owner the same one or a new one.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from shared_cache.errors import ConfigError
from shared_cache.host import protocol as wire
from shared_cache.host.adoption import Adoption
from shared_cache.host.arena import OwnedArena, host_bytes_for
from shared_cache.host.folder import ArenaPaths, is_locked
from shared_cache.host.index import HostIndex
from shared_cache.host.journal import ArenaJournal, EventRing
from shared_cache.host.record_format import ReservedRecord
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
        self._clients[message.holder] = client
        self._away.discard(message.holder)
        if former is not None:
            former.end()
        if self._adoption is None or message.boot != self._state.arena.boot:
            self._take_back(client, message)
        else:
            held = (*message.leased, *message.reserved)
            self._adoption.when_checked(held, lambda: self._take_back(client, message))

    def ended(self, client: Client) -> None:
        """A connection has ended; what its client holds ends now if it is dead, else when it is."""
        if self._clients.get(client.holder) is client:
            del self._clients[client.holder]
            self._away.add(client.holder)
            self.look_after_dead()

    def look_after_dead(self) -> None:
        """End what clients held that were away and have died; to be called now and then."""
        dead = [h for h in self._away if not is_locked(self._state.paths.client(h))]
        for holder in dead:
            self._away.discard(holder)
            self._state.paths.client(holder).unlink(missing_ok=True)
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
        number = self._state.index.open_namespace(message.namespace, block_bytes)
        records = self._state.arena.records
        if number >= len(records.namespaces()):
            records.set_namespace(number, message.namespace, block_bytes)
        return number

    def _take_back(self, client: Client, message: wire.Attach) -> None:
        """Give a client what it held before, and end the rest of it, in one step."""
        if self._clients.get(client.holder) is not client:
            return  # it left while its blocks were being checked
        index, holder = self._state.index, client.holder
        is_same_arena = message.boot == self._state.arena.boot
        leased = message.leased if is_same_arena else []
        reserved = message.reserved if is_same_arena else []
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
        if self._adoption is not None:
            self._adoption.returned(holder)
        arena = self._state.arena
        welcome = (arena.boot, arena.geometry.arena_bytes, self._state.admission)
        client.send(wire.Welcome(*welcome, lost, refused))
        self._on_freed()

    def _hand_over(self, slot: int, holder: int) -> bool:
        return self._adoption is not None and self._adoption.hand_over(slot, holder)

    def _is_reserved(self, slot: int, holder: int) -> bool:
        records = self._state.arena.records
        return records.is_slot(slot) and records.read(slot) == ReservedRecord(holder)
