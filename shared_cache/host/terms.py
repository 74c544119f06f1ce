"""What an index of the host tier is told, and what it answers: the words between it and its tiers.

Kept apart from the bookkeeping, so that the arena's owner, its clients and the modules that do the
work can name the same things without importing each other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from shared_cache.eviction import EvictionPolicy
from shared_cache.hashing import BlockHash

Clock = Callable[[], float]

StoreAdmission = Literal["always", "second_use", "never"]

MAX_TTL_S = 30 * 24 * 3600.0
"""Nothing is pinned or preferred for longer at a time; it can be asked for again."""


def checked_ttl_s(ttl_s: float | None) -> float | None:
    """`ttl_s`, but at most `MAX_TTL_S`; raises `ValueError` for one that is no length of time."""
    if ttl_s is None:
        return None
    if not math.isfinite(ttl_s) or ttl_s < 0:
        raise ValueError(f"a time to live must be 0 s or more, and finite: {ttl_s}")
    return min(ttl_s, MAX_TTL_S)


@dataclass(frozen=True, slots=True)
class IndexRules:
    """What an index is to heed. `quotas` maps a tenant to the bytes it may use at most."""

    make_policy: Callable[[Clock], EvictionPolicy]
    quotas: Mapping[bytes, int] = field(default_factory=dict)
    admission: StoreAdmission = "always"


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease given to a holder: `HostLease` without a number (holders are counted per slot)."""

    slots: tuple[int, ...]
    to_store: tuple[int, ...] = ()
    num_from_peers: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """See `HostClaim`."""

    grant: Grant
    slots: tuple[int, ...]
    is_coming: bool = False


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """A block as it is described in the arena, for adoption after a restart."""

    block_hash: BlockHash
    parent: BlockHash
    tenant: bytes
    is_stored: bool


class Journal(Protocol):
    """Told of every change of a slot as it happens, before anybody acts on it.

    The arena's owner writes it into the slot's record, so that a restarted owner knows what lies
    where; a tier of one process has no use for it.
    """

    def reserved(self, slot: int, holder: int) -> None:
        """`slot` is being written by `holder` from now on."""

    def published(self, slot: int, namespace: int, record: BlockRecord, checksum: int) -> None:
        """`slot` holds this block from now on."""

    def stored(self, slot: int) -> None:
        """The shared tier has the block of `slot`."""

    def freed(self, slot: int) -> None:
        """`slot` holds nothing."""

    def extent_assigned(self, extent: int, namespace: int, slot_bytes: int) -> bool:
        """`extent` is cut into slots of `slot_bytes`; False when the system has no memory for it.

        `slot_bytes` 0 (always True): the extent is nobody's again.
        """
