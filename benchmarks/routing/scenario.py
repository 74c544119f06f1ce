"""What is simulated, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from actors.receipt import Receipt
from actors.routing import CostWeights, Speeds
from benchmarks.routing.autoscaler import Autoscale
from benchmarks.routing.hardware import Hardware
from benchmarks.routing.knowledge import EventFaults
from benchmarks.routing.workload import Arrival


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated. `speeds` are what the router believes before its first measurement.

    `deaths` are times and names of replicas that die then. Beyond `max_pending` requests without a
    first token on the chosen replica a request is refused.
    """

    policy: str
    num_replicas: int
    hardware: Hardware = field(default_factory=Hardware)
    seed: int = 1
    warm_up_s: float = 0.0
    faults: EventFaults = field(default_factory=EventFaults)
    speeds: Speeds = field(default_factory=Speeds)
    weights: CostWeights = field(default_factory=CostWeights)
    max_pending: int | None = None
    deaths: tuple[tuple[float, str], ...] = ()
    autoscale: Autoscale | None = None


@dataclass(slots=True)
class Served:
    """What became of one request; `replica_ids` has all that it was sent to."""

    arrival: Arrival
    ttft_s: float | None = None
    first_token_at_s: float = 0.0
    predicted_s: float = 0.0
    receipt: Receipt | None = None
    replica_ids: list[str] = field(default_factory=list)
    is_shed: bool = False


@dataclass(slots=True)
class Outcome:
    """All requests of a run, in order, and what the replicas did."""

    scenario: Scenario
    served: list[Served]
    busy_s: dict[str, float]
    end_s: float
    speeds: Speeds
    pinned_share: float = 0.0
    queue_imbalance: float = 0.0


def merged(parts: Sequence[Outcome]) -> Outcome:
    """One outcome of several clusters that ran beside each other, with the same scenario."""
    count = len(parts)
    return replace(
        parts[0],
        served=[one for part in parts for one in part.served],
        busy_s={
            f"{n} {name}": s for n, part in enumerate(parts) for name, s in part.busy_s.items()
        },
        end_s=max(part.end_s for part in parts),
        pinned_share=sum(part.pinned_share for part in parts) / count,
        queue_imbalance=sum(part.queue_imbalance for part in parts) / count,
    )
