"""A replica seen from outside: whether it serves, and its numbers; and when an engine is stuck.

Watcher, scaler and command line read these and need nothing else of a replica. A process that
answers says little: an engine that has work and does not move is told from one that is idle here.
"""

from dataclasses import dataclass
from typing import Literal

from actors.engine import EngineStats
from shared_cache.cache_stats import CacheStats

ReplicaState = Literal["starting", "ready", "draining", "closed", "failed", "stalled"]
"""`failed`: the engine could not be built or its loop ended; `stalled`: its loop does not move."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """What a watcher has to know of one replica; only `ready` ones get requests.

    `boot_id` is new in every process. `machine` names the machine whose arena it uses, None when
    host memory, if any, is its own. `device_tokens` is how many tokens the device pool can hold; 0
    until `ready`, as is `max_total_tokens`.
    """

    name: str
    boot_id: str
    pid: int
    state: ReplicaState
    reason: str = ""
    device_tokens: int = 0
    max_total_tokens: int = 0
    machine: str | None = None


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A snapshot of one replica; `engine` and `cache` are None until it is ready."""

    health: ReplicaHealth
    uptime_s: float
    num_outstanding: int
    engine: EngineStats | None
    cache: CacheStats | None


class ProgressWatch:
    """Tells since when an engine that has work has not moved."""

    def __init__(self) -> None:
        self._turns = -1
        self._since_s = 0.0

    def stalled_s(self, now_s: float, stats: EngineStats) -> float:
        """Seconds without a turn although requests wait or run; mutates."""
        is_idle = stats.num_running + stats.num_waiting == 0
        if is_idle or stats.num_turns != self._turns:
            self._turns, self._since_s = stats.num_turns, now_s
        return now_s - self._since_s
