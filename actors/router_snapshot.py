"""What a router tells of itself. Pure."""

from dataclasses import dataclass, field

from actors.routing.accuracy import AccuracySnapshot


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """The router's view of one replica; `known_blocks` are believed to be on its device."""

    replica_id: str
    boot_id: str
    alive: bool
    pending_tokens: int
    num_outstanding: int
    known_blocks: int
    num_routed: int
    accuracy: AccuracySnapshot = field(default_factory=AccuracySnapshot)


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """The router's view of everything; counters since its start.

    `predicted_cached_tokens` against `actual_cached_tokens` tells how good its knowledge is.
    `num_gaps` messages of caches were missed, each repaired by one of `num_snapshots`.
    """

    policy: str
    replicas: tuple[ReplicaSnapshot, ...]
    shared_blocks: int
    num_reservations: int
    num_expired: int
    predicted_cached_tokens: int
    actual_cached_tokens: int
    index_blocks: int = 0
    num_gaps: int = 0
    num_snapshots: int = 0
