"""What an engine tells of its own memory, in the form that the router believes. Pure."""

from dataclasses import dataclass

from shared_cache.hashing import BlockHash


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """What an engine's own memory got and lost, for the router.

    `stored` are whole chains, each from block 0 on, named in their requests' own scope; what
    follows a block of `removed` in some chain is of no use any more. `is_cleared`: forget what was
    known before.
    """

    stored: tuple[tuple[BlockHash, ...], ...] = ()
    removed: tuple[BlockHash, ...] = ()
    is_cleared: bool = False

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed or self.is_cleared)
