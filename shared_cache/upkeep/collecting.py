"""Which stored runs to delete: the pure choice behind every clean-up of a shared tier.

A store that only grows fills its disk, and then nobody saves anything any more. What is deleted
must not make the rest useless: a run can be found only through the blocks before it, so a run that
a kept one needs is never deleted, however long ago it was used itself. Of the others the least
recently used go first.

Clocks are not believed blindly. A run used more than `CLOCK_SKEW_S` in the future carries a wrong
time, or our clock is wrong. Where such runs are the minority theirs are wrong: they count as the
oldest, so none is kept for ever. Else our clock has been set back: nothing is too old then.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shared_cache.hashing import BlockHash
from shared_cache.stores.store import StoredRun

LOW_WATER = 0.9
"""A store over its budget is brought down to this part of it, so that not every save cleans up."""

CLOCK_SKEW_S = 86400.0
"""Clocks of machines that share a store differ by less, wrong time zones aside."""

_OLDEST = float("-inf")

Reason = Literal["age", "budget", "quota"]


@dataclass(frozen=True, slots=True)
class CollectionRules:
    """How much may stay, and for how long after its last use; None: no limit.

    The limits hold for a whole store, all its namespaces together; `quotas` for what some tenants
    (`ReuseScope.tenant`) have in it.
    """

    max_bytes: int | None = None
    max_age_s: float | None = None
    quotas: Mapping[bytes, int] = field(default_factory=dict)

    @property
    def least_bytes(self) -> int | None:
        """A store of no more than this breaks no limit of bytes; None: there is none."""
        limits = [*self.quotas.values(), *(() if self.max_bytes is None else (self.max_bytes,))]
        return min(limits, default=None)


@dataclass(frozen=True, slots=True)
class Victim:
    """A run to delete, the namespace that it lies in, and which rule asks for that."""

    namespace: str
    run: StoredRun
    reason: Reason


def choose_victims(
    runs: Mapping[str, Sequence[StoredRun]],
    rules: CollectionRules,
    now_s: float,
    keep: Callable[[BlockHash], bool] = lambda block_hash: False,
) -> list[Victim]:
    """The runs to delete, in this order, of the `runs` of every namespace (by any key).

    A run with a block that `keep` names, and all that such a run needs, stays even where that
    breaks a rule. Runs without a time (`used_s` 0) go first for the budget and never for their age.
    The order of the input does not matter.
    """
    forest = _Forest(runs, now_s, keep)
    victims: list[Victim] = []
    if rules.max_age_s is not None:
        oldest_s = now_s - rules.max_age_s
        aged = forest.fell(lambda index: forest.is_unused_since(index, oldest_s))
        victims.extend(forest.victim(index, "age") for index in aged)
    victims.extend(forest.victim(index, "quota") for index in _beyond_quotas(forest, rules.quotas))
    if rules.max_bytes is not None and forest.num_bytes > rules.max_bytes:
        goal_bytes = int(rules.max_bytes * LOW_WATER)
        surplus = forest.fell(lambda index: forest.num_bytes > goal_bytes)
        victims.extend(forest.victim(index, "budget") for index in surplus)
    return victims


def _beyond_quotas(forest: "_Forest", quotas: Mapping[bytes, int]) -> Iterator[int]:
    """What tenants have too much, each brought down to `LOW_WATER` of its quota."""
    goals = {
        tenant: int(quota * LOW_WATER)
        for tenant, quota in quotas.items()
        if forest.tenant_bytes[tenant] > quota
    }
    if not goals:
        return

    def is_beyond(index: int) -> bool:
        tenant = forest.tenant(index)
        return tenant in goals and forest.tenant_bytes[tenant] > goals[tenant]

    yield from forest.fell(is_beyond)


class _Forest:
    """The runs that are left, by number in the order of their last use, and which need which."""

    def __init__(
        self,
        runs: Mapping[str, Sequence[StoredRun]],
        now_s: float,
        keep: Callable[[BlockHash], bool],
    ) -> None:
        found = [(namespace, run) for namespace, some in runs.items() for run in some]
        time_of, self._has_ages = _believed_times([run for _, run in found], now_s)
        found.sort(key=lambda item: (time_of(item[1]), item[0], item[1].name))
        self._runs = found
        self._times_s = [time_of(run) for _, run in found]
        self._needs = _needs(found)
        self._num_needed_by = [0] * len(found)
        for needed in self._needs:
            for index in needed:
                self._num_needed_by[index] += 1
        self._stays = [any(map(keep, run.hashes)) for _, run in found]
        self._is_gone = [False] * len(found)
        self.num_bytes = sum(run.num_bytes for _, run in found)
        self.tenant_bytes: Counter[bytes] = Counter()
        for _, run in found:
            self.tenant_bytes[run.tenant] += run.num_bytes

    def victim(self, index: int, reason: Reason) -> Victim:
        """Run `index` as the caller is told of it."""
        return Victim(*self._runs[index], reason)

    def tenant(self, index: int) -> bytes:
        """Who pays for run `index`."""
        return self._runs[index][1].tenant

    def is_unused_since(self, index: int, oldest_s: float) -> bool:
        """Whether run `index` tells a time, and one before `oldest_s`."""
        has_time = self._has_ages and self._runs[index][1].used_s > 0
        return has_time and self._times_s[index] < oldest_s

    def fell(self, should_go: Callable[[int], bool]) -> Iterator[int]:
        """Remove the runs for which `should_go` holds and that no run needs any more, oldest first.

        Removing one may free those that it needed; they take their turn by age.
        """
        leaves = [i for i in range(len(self._runs)) if self._may_go(i)]  # sorted, so a heap
        while leaves:
            index = heapq.heappop(leaves)
            if not should_go(index):
                continue
            self._is_gone[index] = True
            run = self._runs[index][1]
            self.num_bytes -= run.num_bytes
            self.tenant_bytes[run.tenant] -= run.num_bytes
            for needed in self._needs[index]:
                self._num_needed_by[needed] -= 1
                if self._may_go(needed):
                    heapq.heappush(leaves, needed)
            yield index

    def _may_go(self, index: int) -> bool:
        return not (self._num_needed_by[index] or self._stays[index] or self._is_gone[index])


def _needs(runs: Sequence[tuple[str, StoredRun]]) -> list[list[int]]:
    """For every run those that hold the block before it: all of them, where several do.

    Real hashes cannot form a circle. A run whose parent nobody holds begins a chain, or has lost
    its beginning: a root's hash looks like any other, so both end by age or budget alone.
    """
    holders: dict[tuple[str, BlockHash], list[int]] = defaultdict(list)
    parents = {(namespace, run.parent) for namespace, run in runs}
    for index, (namespace, run) in enumerate(runs):
        for block_hash in run.hashes:
            if (namespace, block_hash) in parents:
                holders[namespace, block_hash].append(index)
    return [
        [holder for holder in holders.get((namespace, run.parent), ()) if holder != index]
        for index, (namespace, run) in enumerate(runs)
    ]


def _believed_times(
    runs: Sequence[StoredRun], now_s: float
) -> tuple[Callable[[StoredRun], float], bool]:
    """When a run counts as used, and whether our clock is good enough to speak of ages."""
    latest_s = now_s + CLOCK_SKEW_S
    num_dated = sum(run.used_s > 0 for run in runs)
    num_ahead = sum(run.used_s > latest_s for run in runs)
    if 2 * num_ahead > num_dated:
        return (lambda run: run.used_s), False
    return (lambda run: _OLDEST if run.used_s > latest_s else run.used_s), True
