"""Places: slots of the node's arena in words that all its processes understand.

A slot's number is a process's own: who has seen two arenas counts those of the second from another
base. An engine on several devices has one process that leases for all of them and one that copies
for each, so a number alone could name another block there, and the copy would be garbage. A place
therefore names the arena, and counts its slots without gaps, which also packs well.

Who copies may be attached to another arena than who leased, for the moments in which an arena is
replaced. So the one read last stays mapped, and one that is not mapped yet is mapped then.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from shared_cache.errors import HostMemoryGoneError
from shared_cache.host.folder import ArenaPaths
from shared_cache.host.interface import Place, PlacedBlocks
from shared_cache.host.mapping import MappedArena
from shared_cache.host.session import OwnerSession


class ArenaPlaces:
    """Names the slots that are leased here, and finds those that another process names.

    It never waits for the owner. For one thread; mapping an arena that took another one's place
    costs a system call.
    """

    def __init__(self, session: OwnerSession, paths: ArenaPaths, block_bytes: int) -> None:
        self._session = session
        self._paths = paths
        self._block_bytes = block_bytes
        self._last = session.arenas[0]

    def place(self, arena: MappedArena, slots: Sequence[int]) -> Place:
        """The place of slots of `arena`, by their numbers in this process."""
        extents, units = np.divmod(np.array(slots, np.int64) - arena.base, arena.extent_units)
        indices = extents * arena.slots_per_extent + units // arena.slot_units
        return Place(arena.boot, array("I", indices.astype(np.uint32).tobytes()))

    def blocks(self, place: Place) -> PlacedBlocks:
        """The bytes at `place`; `HostMemoryGoneError` where that arena is mapped by nobody here."""
        arena = self._find(place.memory)
        indices = np.frombuffer(place.slots, np.uint32).astype(np.int64)
        extents, units = np.divmod(indices, arena.slots_per_extent)
        places = extents * arena.extent_units + units * arena.slot_units
        if arena in self._session.arenas:  # what comes next from there may be copied faster
            firsts = arena.base + np.unique(extents) * arena.extent_units
            self._session.extents.show_soon(arena, firsts.tolist())
        return arena.blocks(places)

    def _find(self, memory: bytes) -> MappedArena:
        for arena in (*self._session.arenas, self._last):
            if arena.boot == memory:
                self._last = arena
                return arena
        try:
            self._last = MappedArena.open(self._paths, memory, self._block_bytes)
        except (OSError, ValueError) as error:
            raise HostMemoryGoneError(
                f"blocks are leased in an arena that was at {self._paths.arena} and is not there "
                f"any more ({error}); leave the files of a running arena alone"
            ) from error
        return self._last
