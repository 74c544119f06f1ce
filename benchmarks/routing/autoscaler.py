"""How many replicas there should be: Ray Serve's rule, a target of ongoing requests for each."""

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class Autoscale:
    """Settings. A new replica has empty caches, and takes requests `start_s` after the decision."""

    min_replicas: int
    max_replicas: int
    target_ongoing: float = 6.0
    interval_s: float = 5.0
    start_s: float = 30.0
    shrink_after_s: float = 60.0


class Autoscaler:
    """Decides at every interval; pure."""

    def __init__(self, settings: Autoscale) -> None:
        self.settings = settings
        self._too_many_since_s: float | None = None

    def change(self, num_replicas: int, num_ongoing: int, now_s: float) -> int:
        """How many to start (above 0) or drain; `num_replicas` counts those that are starting."""
        settings = self.settings
        wanted = ceil(num_ongoing / settings.target_ongoing)
        wanted = min(settings.max_replicas, max(settings.min_replicas, wanted))
        if wanted >= num_replicas:
            self._too_many_since_s = None
            return wanted - num_replicas
        if self._too_many_since_s is None:
            self._too_many_since_s = now_s
        if now_s - self._too_many_since_s < settings.shrink_after_s:
            return 0
        self._too_many_since_s = now_s
        return -1
