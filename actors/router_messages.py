"""What ingresses and the router say to each other: small, and many in one message. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.receipt import Receipt


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A process that takes requests. `boot_id` tells a restarted one from the old one.

    `machine` names the machine whose arena it uses (None: its host memory is its own);
    `kv_capacity_tokens` is the room of its device (0: not known).
    """

    replica_id: str
    boot_id: str
    machine: str | None = None
    kv_capacity_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """A prompt that needs a replica other than `avoid`.

    `request_id` is the caller's, unique among all callers: what is reported later names it. `keys`
    are those of the prompt's blocks that may be reused (`routing_keys`), in order;
    `output_tokens` the longest output, None when unknown. `session` names a conversation.
    """

    request_id: int
    num_tokens: int
    keys: Sequence[int] = ()
    avoid: tuple[str, ...] = ()
    output_tokens: int | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token came `ttft_s` after the route was asked for; the engine took `prefill_s`."""

    request_id: int
    receipt: Receipt
    ttft_s: float | None = None
    prefill_s: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A request has ended, well or not.

    `new_keys` are blocks behind those of the prompt that it has left on its replica's device.
    """

    request_id: int
    new_keys: Sequence[int] = ()
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """A replica did not serve to the end."""

    replica_id: str
    boot_id: str


@dataclass(frozen=True, slots=True)
class Running:
    """A request that runs on a replica which this router has not chosen itself."""

    request_id: int
    replica_id: str
    boot_id: str
    num_tokens: int
    has_first_token: bool


Report = FirstToken | Finished | Lost | Running


@dataclass(frozen=True, slots=True)
class Batch:
    """Reports, in their order, and then requests; `known_replicas` is the version of the list."""

    reports: tuple[Report, ...] = ()
    requests: tuple[RouteRequest, ...] = ()
    known_replicas: tuple[str, int] = ("", 0)


@dataclass(frozen=True, slots=True)
class Route:
    """A choice and its booking.

    The replica is believed to hold `known_tokens`, the shared tier `shared_tokens`; `work_tokens`
    are left to compute, and the first token is predicted after `first_token_s` (None: not
    predicted, the router was away and the caller has chosen by its own view).
    """

    request_id: int
    replica_id: str
    boot_id: str
    known_tokens: int = 0
    shared_tokens: int = 0
    work_tokens: int = 0
    first_token_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """One route for each request; None where no replica is up that is not to be avoided.

    `replicas` are the (id, boot) of all that are up, None where the asker's version of the list is
    this one. The version's first part is new for every process of a router.
    """

    routes: tuple[Route | None, ...]
    version: tuple[str, int]
    replicas: tuple[tuple[str, str], ...] | None = field(default=None)
