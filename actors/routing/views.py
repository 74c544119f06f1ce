"""What a routing policy may see: one prompt, and the live state of each replica.

A policy that could look into engines could not be replayed from a list of events, and would be
tempted to use figures that are late in earnest. All that is here is known to the router at once,
from its own bookings and from the index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Match(NamedTuple):
    """How many leading tokens of one prompt a replica has in its own memory.

    `device_tokens` lie on the device or are being computed there for a request that is booked;
    `host_tokens` on the device or in its machine's host memory, so never fewer than on the device.
    """

    device_tokens: int = 0
    host_tokens: int = 0


NO_MATCH = Match()


@dataclass(frozen=True, slots=True)
class PromptView:
    """What is known of one prompt.

    `shared_tokens` leading tokens lie in the shared tier, the same for every replica. `matches`
    has an entry for each replica that is known to hold some of it; the others hold nothing.
    `session` names what belongs together (a conversation), for policies with session affinity;
    `output_tokens` is the longest or expected output, None when unknown.
    """

    num_tokens: int
    shared_tokens: int = 0
    matches: Mapping[str, Match] = field(default_factory=dict)
    session: str | None = None
    output_tokens: int | None = None

    def match(self, replica_id: str) -> Match:
        """What this replica holds of the prompt."""
        return self.matches.get(replica_id, NO_MATCH)


@dataclass(slots=True, eq=False)
class ReplicaView:
    """The live state of one replica; `Bookings` writes it, policies only read it.

    Pending requests are booked and have not brought their first token, running ones have.
    Work is in seconds of prefill on an idle replica. `kv_tokens` counts prompts and expected
    outputs of all of them, what they share once, against `kv_capacity_tokens` (0: not known);
    `running_kv_tokens` those of each running request, which every step has to read.
    `busy_since_s` is when the head of the queue became the head, `*_link_free_s` when all booked
    transfers of that link should be done (`links_free_s`: of both), `floor_s` what there is to wait
    for at least, whatever the time.
    `is_load_only` tells that what is believed of its cache is wrong too often to be used.
    """

    replica_id: str
    kv_capacity_tokens: int = 0
    num_pending: int = 0
    num_running: int = 0
    pending_work_s: float = 0.0
    pending_tokens: int = 0
    head_work_s: float = 0.0
    busy_since_s: float = 0.0
    floor_s: float = 0.0
    links_free_s: float = 0.0
    kv_tokens: int = 0
    running_kv_tokens: int = 0
    host_link_free_s: float = 0.0
    store_link_free_s: float = 0.0
    is_load_only: bool = False
    num_routed: int = 0

    @property
    def num_outstanding(self) -> int:
        """Requests that have not ended."""
        return self.num_pending + self.num_running


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What may be chosen from, at least one replica, at one moment.

    `mean_pending` is the number of pending requests per replica, averaged over some seconds.
    """

    replicas: Sequence[ReplicaView]
    mean_pending: float = 0.0
    now_s: float = 0.0
