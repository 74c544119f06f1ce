"""How many replicas there should be, by queue and load; events in, decisions out. Pure.

A count that follows every gust of load would start replicas that are not needed once they have
loaded their model, and end those that are needed a moment later, with what they hold in memory. So
one is added only after load was high for a while, one is removed only after it was low for a longer
while, and after each change the next one waits until its effect shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verb = Literal["add", "remove", "keep"]


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """When to change the number of replicas.

    Load is what a replica has to do over what it can do at the same time: 1.0 is a full batch and
    nobody waiting. `up_after_s` and `down_after_s` are how long it must stay above `high` or below
    `low` (below it also with one replica less); `pause_s` is the least time between two changes.
    """

    min_replicas: int
    max_replicas: int
    high: float = 1.0
    low: float = 0.5
    up_after_s: float = 15.0
    down_after_s: float = 300.0
    pause_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one ready replica has to do: requests running or waiting, of how many at a time."""

    replica: str
    num_requests: int
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class Scaling:
    """What to do now: `replica` is the one to remove. `load` is what that was decided by."""

    verb: Verb
    load: float
    replica: str = ""


class Awaited:
    """Which replicas that do not serve will soon: those that are new, or served, not long ago.

    One that fails or is silent is restarted again and again. Waited for, it would keep others from
    being added for ever.
    """

    def __init__(self, startup_timeout_s: float) -> None:
        self._startup_timeout_s = startup_timeout_s
        self._since_s: dict[str, float] = {}

    def count(self, states: Mapping[str, str | None], now_s: float) -> int:
        """How many to wait for; `states` are those of all replicas, None where none is known."""
        self._since_s = {
            name: float("-inf") if state == "failed" else self._since_s.get(name, now_s)
            for name, state in states.items()
            if state != "ready"
        }
        return sum(now_s - since_s < self._startup_timeout_s for since_s in self._since_s.values())


class Scaler:
    """Loads in, decisions out; time is given, not read, and must not go back."""

    def __init__(self, rules: ScalingRules, now_s: float) -> None:
        self._rules = rules
        self._high_since_s: float | None = None
        self._low_since_s: float | None = None
        self._changed_s = now_s - rules.pause_s

    def decide(
        self, loads: list[ReplicaLoad], num_pending: int, now_s: float, num_broken: int = 0
    ) -> Scaling:
        """What to do, given the ready replicas and how many more are starting.

        `num_broken` more do not serve and are not waited for; they take up places all the same.
        A decision to change is a change: call `failed` if nothing came of it.
        """
        rules = self._rules
        load = _load(loads, len(loads))
        self._note(load, _load(loads, len(loads) - 1), now_s)
        total = len(loads) + num_pending
        has_place = total + num_broken < rules.max_replicas
        may_change = now_s - self._changed_s >= rules.pause_s
        if total < rules.min_replicas and has_place:  # one was lost, or never came
            return self._changed("add", load, now_s) if may_change else Scaling("keep", load)
        if num_pending or not may_change:
            return Scaling("keep", load)
        if has_place and _lasted(self._high_since_s, rules.up_after_s, now_s):
            return self._changed("add", load, now_s)
        if total > rules.min_replicas and _lasted(self._low_since_s, rules.down_after_s, now_s):
            idlest = min(loads, key=lambda one: (one.num_requests, _newest_first(one.replica)))
            return self._changed("remove", load, now_s, idlest.replica)
        return Scaling("keep", load)

    def failed(self, now_s: float) -> None:
        """The last change came to nothing; the next one waits all the same."""
        self._changed_s = now_s

    def _note(self, load: float, load_with_one_less: float, now_s: float) -> None:
        """Since when load has been high, and since when it is low, also with one replica less."""
        is_high = load > self._rules.high
        is_low = max(load, load_with_one_less) < self._rules.low
        self._high_since_s = _since(self._high_since_s, is_high, now_s)
        self._low_since_s = _since(self._low_since_s, is_low, now_s)

    def _changed(self, verb: Verb, load: float, now_s: float, replica: str = "") -> Scaling:
        self._changed_s = now_s
        self._high_since_s = self._low_since_s = None
        return Scaling(verb, load, replica)


def _load(loads: list[ReplicaLoad], num_replicas: int) -> float:
    """What there is to do over what so many of these replicas can do at the same time."""
    if num_replicas < 1:
        return float("inf") if any(one.num_requests for one in loads) else 0.0
    places = sum(one.max_batch_size for one in loads) / len(loads) * num_replicas
    return sum(one.num_requests for one in loads) / places


def _since(since_s: float | None, is_so: bool, now_s: float) -> float | None:
    if not is_so:
        return None
    return now_s if since_s is None else since_s


def _lasted(since_s: float | None, duration_s: float, now_s: float) -> bool:
    return since_s is not None and now_s - since_s >= duration_s


def _newest_first(name: str) -> tuple[int, str]:
    """Of equally idle replicas the one with the highest number goes: the others are older."""
    _, _, number = name.rpartition("-")
    return (-int(number) if number.isdigit() else 0, name)
