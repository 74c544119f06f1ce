"""Upkeep of a store: keeping it within its budget and its age while it is in use.

Any number of processes may clean up at the same time, beside readers and writers: a run that is
gone is a miss, and deleting it once more is no error. On a local disk a lock keeps all but one from
it all the same, and nobody lists a store in which little has changed: that takes seconds where it
is large. Whoever notices that something must go wakes the one whose turn it is.
"""

import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass

from shared_cache.config import TierConfig
from shared_cache.faults import Clock, FaultLog
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.interface import HostTier
from shared_cache.stores.size_estimate import SizeEstimate
from shared_cache.stores.store import BlockStore
from shared_cache.upkeep.collecting import CollectionRules, Victim, choose_victims
from shared_cache.upkeep.upkeep_turn import Turn, lock_path
from shared_cache.upkeep.whole_store import Deletable, FoundNamespace, WholeStore, folder_of

logger = logging.getLogger(__name__)

DUE_SHARE = 0.01
"""Part of the budget: who wrote as much has the store listed again."""

QUOTA_DUE_SHARE = 0.1
"""Part of the least quota: who wrote as much has the tenants' shares looked at again."""

MIN_PAUSE_S = 1.0
"""Between two rounds, however urgent they are."""
CLOSE_TIMEOUT_S = 5.0

Stores = Mapping[str, Deletable]
"""Namespaces by their folder in the store."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a clean-up deleted, or would have; `left_bytes` is what stays."""

    victims: tuple[Victim, ...]
    left_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the victims."""
        return sum(victim.run.num_bytes for victim in self.victims)


def plan_collection(
    stores: Stores,
    rules: CollectionRules,
    now_s: float,
    host: HostTier | None = None,
    host_namespace: str = "",
) -> Collected:
    """List `stores` and choose what is to be deleted; see `choose_victims`. Deletes nothing.

    Blocks of `host_namespace` that `host` has in use are spared, whatever their age, and go for the
    budget only when there is nothing else: a disk that is full helps nobody.
    """
    runs = {key: list(store.entries()) for key, store in stores.items()}
    kept: Set[BlockHash] = frozenset()
    victims = tuple(choose_victims(runs, rules, now_s))
    while host is not None:  # only what is to go is asked for; what goes instead, then
        asked = [h for one in victims if one.namespace == host_namespace for h in one.run.hashes]
        more = host.in_use(asked)
        if more <= kept:
            break
        kept |= more
        victims = tuple(choose_victims(runs, rules, now_s, kept.__contains__))
    if kept:
        gone = {(victim.namespace, victim.run.name) for victim in victims}
        left = {key: [r for r in some if (key, r.name) not in gone] for key, some in runs.items()}
        budget = CollectionRules(max_bytes=rules.max_bytes, quotas=rules.quotas)
        victims += tuple(choose_victims(left, budget, now_s))
    all_bytes = sum(run.num_bytes for some in runs.values() for run in some)
    return Collected(victims, all_bytes - sum(victim.run.num_bytes for victim in victims))


class Housekeeper:
    """Keeps a store within `rules`, from a thread of its own.

    What it knows of the store's size is the last listing, what this process has written since
    (`written`), and how fast the store grew between the last two listings. It lists again when that
    exceeds the budget, at once if it was this process that wrote; when the disk was found full
    (`found_full`); every `RELIST_ROUNDS` rounds; and, until it has listed twice, in every round.
    Heads are read only when something is to be deleted, or may be: where tenants have quotas, of a
    store that holds more than the least of them.

    `whole` is the store with all its namespaces, which share the limits; None: there is only the
    namespace of `store`.
    """

    def __init__(
        self,
        store: BlockStore,
        rules: CollectionRules,
        interval_s: float = 60.0,
        clock: Clock = time.time,
        whole: WholeStore | None = None,
    ) -> None:
        self._store = store
        self._rules = rules
        self._interval_s = interval_s
        self._clock = clock
        self._whole = whole
        self._host: HostTier | None = None
        self._estimate = SizeEstimate()
        self._turn = Turn(lock_path(getattr(store, "url", None)))
        self._due_bytes = _due_bytes(rules)
        self._untold_bytes = 0
        self._wake = threading.Event()
        self._faults = FaultLog(logger)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvcommons-upkeep", daemon=True)

    def start(self) -> None:
        """Begin; the first clean-up is within `interval_s`."""
        self._thread.start()

    def written(self, num_bytes: int) -> None:
        """This process has stored so many bytes."""
        self._estimate.written(num_bytes)
        if self._due_bytes is None:
            return
        self._untold_bytes += num_bytes  # a lost update only delays what follows
        if self._untold_bytes > self._due_bytes:
            self._untold_bytes = 0
            self._turn.call()
            if self._rules.quotas:
                self._estimate.distrust()  # whose bytes these are, only listing tells
        max_bytes = self._rules.max_bytes
        if max_bytes is not None and self._estimate.is_over(max_bytes, DUE_SHARE * max_bytes):
            self._wake.set()

    def found_full(self) -> None:
        """The store had no room for a block."""
        self._turn.call()
        self._estimate.distrust()
        self._wake.set()

    def protect(self, host: HostTier) -> None:
        """Spare what `host` has in use, of the store's namespace, and tell it what was deleted."""
        self._host = host

    @property
    def num_faults(self) -> int:
        """Clean-ups that failed."""
        return self._faults.num_faults

    def tick(self) -> Collected | None:
        """One round: clean up if that may be due; None when it is not, or another process does it.

        Raises what the store raises.
        """
        is_due = self._estimate.is_due(self._rules.max_bytes)
        if not self._turn.take() or not (self._turn.was_called() or is_due):
            return None
        now_s, found = self._clock(), []
        if self._whole is not None:
            found = [one for one in self._whole.find(tidies=True) if not one.is_newer]
            if not self._has_work(found, now_s):
                num_bytes = sum(one.num_bytes for one in found)
                self._estimate.listed(num_bytes, num_bytes)
                return None
        collected = self._collect(found, now_s)
        self._estimate.listed(collected.left_bytes + collected.num_bytes, collected.left_bytes)
        return collected

    def _has_work(self, found: Sequence[FoundNamespace], now_s: float) -> bool:
        """Whether a listing without heads shows that a rule is broken, or may be."""
        least_bytes, max_age_s = self._rules.least_bytes, self._rules.max_age_s
        if least_bytes is not None and sum(one.num_bytes for one in found) > least_bytes:
            return True
        times_s = (one.used_first_s for one in found if one.used_first_s is not None)
        return max_age_s is not None and any(used_s < now_s - max_age_s for used_s in times_s)

    def _collect(self, found: Sequence[FoundNamespace], now_s: float) -> Collected:
        """List, choose and delete, until done or closed."""
        done: list[Victim] = []
        with ExitStack() as opened:
            stores = self._whole.deletable(found) if self._whole else {}
            for other in stores.values():
                opened.callback(other.close)
            own = folder_of(self._store.namespace)
            stores[own] = self._store
            plan = plan_collection(stores, self._rules, now_s, self._host, own)
            for victim in plan.victims:
                if self._closing.is_set():
                    break
                stores[victim.namespace].delete(victim.run.name)
                done.append(victim)
                if self._host is not None and victim.namespace == own:
                    self._host.stored(victim.run.hashes, is_stored=False)
        kept_bytes = sum(victim.run.num_bytes for victim in plan.victims[len(done) :])
        return Collected(tuple(done), plan.left_bytes + kept_bytes)

    def close(self) -> None:
        """Stop, after at most `CLOSE_TIMEOUT_S`; a second close is a no-op."""
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        self._turn.give_up()

    def _work(self) -> None:
        # Processes that were started together must not list a store together.
        pause_s = min(MIN_PAUSE_S, self._interval_s)
        while not self._closing.wait(pause_s):
            self._wake.wait(max(0.0, self._interval_s * random.uniform(0.5, 1.0) - pause_s))
            self._wake.clear()
            if self._closing.is_set():
                return
            with self._faults.caught("cleaning up the store"):
                self.tick()


def keep_house(store: BlockStore, tier: TierConfig) -> Housekeeper | None:
    """The housekeeper, not started yet, that `tier` asks for; None when it sets no limit.

    It looks after all namespaces of the tier. A store that is only read is somebody else's care.
    """
    quotas = {ReuseScope(salt).tenant: int(limit) for salt, limit in tier.quotas.items()}
    rules = CollectionRules(tier.max_bytes, tier.max_age_s, quotas)
    if store.read_only or rules == CollectionRules():
        return None
    return Housekeeper(store, rules, whole=WholeStore(tier.url, tier.options))


def _due_bytes(rules: CollectionRules) -> float | None:
    """Who wrote as much tells the others that a limit may be broken; None: no limit of bytes."""
    shares = [QUOTA_DUE_SHARE * quota for quota in rules.quotas.values()]
    if rules.max_bytes is not None:
        shares.append(DUE_SHARE * rules.max_bytes)
    return min(shares, default=None)
