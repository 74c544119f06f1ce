"""Upkeep of a store: keeping it within its budget and its age while it is in use.

Any number of processes may clean up at the same time, beside readers and writers: a run that is
gone is a miss, and deleting it once more is no error. On a local disk a lock keeps all but one from
it all the same, and nobody lists a store in which little has changed: that takes seconds where it
is large.
"""

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from filelock import FileLock, Timeout

from shared_cache.collecting import CollectionRules, Victim, choose_victims
from shared_cache.config import TierConfig
from shared_cache.faults import Clock, FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.store import BlockStore
from shared_cache.whole_store import Deletable, FoundNamespace, WholeStore, folder_of

logger = logging.getLogger(__name__)

LOCK_NAME = "upkeep.lock"
RELIST_ROUNDS = 10
"""A store is listed again after so many rounds, however little this process has written."""

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
    keep: Callable[[BlockHash], bool] = lambda block_hash: False,
) -> Collected:
    """List `stores` and choose what is to be deleted; see `choose_victims`. Deletes nothing."""
    runs = {key: list(store.entries()) for key, store in stores.items()}
    victims = tuple(choose_victims(runs, rules, now_s, keep))
    all_bytes = sum(run.num_bytes for some in runs.values() for run in some)
    return Collected(victims, all_bytes - sum(victim.run.num_bytes for victim in victims))


class Housekeeper:
    """Keeps a store within `max_bytes` and `max_age_s`, from a thread of its own.

    What it knows of the store's size is the last listing, what this process has written since
    (`written`), and how fast the store grew between the last two listings. It lists again when that
    exceeds the budget, and every `RELIST_ROUNDS` rounds; heads are read only when something is to
    be deleted. `whole` is the store with all its namespaces, which share the limits; None: there is
    only the namespace of `store`.
    """

    def __init__(
        self,
        store: BlockStore,
        max_bytes: int | None,
        max_age_s: float | None,
        interval_s: float = 60.0,
        clock: Clock = time.time,
        whole: WholeStore | None = None,
    ) -> None:
        self._store = store
        self._rules = CollectionRules(max_bytes, max_age_s)
        self._interval_s = interval_s
        self._clock = clock
        self._whole = whole
        self._estimate = SizeEstimate()
        self._turn = Turn(_lock_path(getattr(store, "url", None)))
        self._faults = FaultLog(logger)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvcommons-upkeep", daemon=True)

    def start(self) -> None:
        """Begin; the first clean-up is within `interval_s`."""
        self._thread.start()

    def written(self, num_bytes: int) -> None:
        """This process has stored so many bytes."""
        self._estimate.written(num_bytes)

    @property
    def num_faults(self) -> int:
        """Clean-ups that failed."""
        return self._faults.num_faults

    def tick(self) -> Collected | None:
        """One round: clean up if that may be due; None when it is not, or another process does it.

        Raises what the store raises.
        """
        if not self._estimate.is_due(self._rules.max_bytes) or not self._turn.take():
            return None
        now_s, found = self._clock(), []
        if self._whole is not None:
            found = [one for one in self._whole.find() if not one.is_newer]
            if not self._has_work(found, now_s):
                num_bytes = sum(one.num_bytes for one in found)
                self._estimate.listed(num_bytes, num_bytes)
                return None
        collected = self._collect(found, now_s)
        self._estimate.listed(collected.left_bytes + collected.num_bytes, collected.left_bytes)
        return collected

    def _has_work(self, found: Sequence[FoundNamespace], now_s: float) -> bool:
        """Whether a listing without heads shows that a rule is broken."""
        max_bytes, max_age_s = self._rules.max_bytes, self._rules.max_age_s
        if max_bytes is not None and sum(one.num_bytes for one in found) > max_bytes:
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
            stores[folder_of(self._store.namespace)] = self._store
            plan = plan_collection(stores, self._rules, now_s)
            for victim in plan.victims:
                if self._closing.is_set():
                    break
                stores[victim.namespace].delete(victim.run.name)
                done.append(victim)
        kept_bytes = sum(victim.run.num_bytes for victim in plan.victims[len(done) :])
        return Collected(tuple(done), plan.left_bytes + kept_bytes)

    def close(self) -> None:
        """Stop, after at most `CLOSE_TIMEOUT_S`; a second close is a no-op."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        self._turn.give_up()

    def _work(self) -> None:
        # Processes that were started together must not list a store together.
        while not self._closing.wait(self._interval_s * random.uniform(0.5, 1.0)):
            with self._faults.caught("cleaning up the store"):
                self.tick()


def keep_house(store: BlockStore, tier: TierConfig) -> Housekeeper | None:
    """The housekeeper, not started yet, that `tier` asks for; None when it sets no limit.

    It looks after all namespaces of the tier. A store that is only read is somebody else's care.
    """
    if store.read_only or (tier.max_bytes is None and tier.max_age_s is None):
        return None
    whole = WholeStore(tier.url, tier.options)
    return Housekeeper(store, tier.max_bytes, tier.max_age_s, whole=whole)


class SizeEstimate:
    """How large a store is by now, as far as can be told without listing it; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listed_bytes: int | None = None
        self._written_bytes = 0
        self._growth_bytes = 0.0
        self._num_rounds = 0

    def written(self, num_bytes: int) -> None:
        """This process has stored so many bytes since the last listing."""
        with self._lock:
            self._written_bytes += num_bytes

    def listed(self, num_bytes: int, left_bytes: int) -> None:
        """Listing found `num_bytes`, of which `left_bytes` were left there."""
        with self._lock:
            if self._listed_bytes is not None:
                grown_bytes = max(0, num_bytes - self._listed_bytes)
                self._growth_bytes = grown_bytes / max(1, self._num_rounds)
            self._listed_bytes = left_bytes
            self._written_bytes = self._num_rounds = 0

    def is_due(self, max_bytes: int | None) -> bool:
        """Whether the store must be listed now; called once a round."""
        with self._lock:
            self._num_rounds += 1
            if self._listed_bytes is None or self._num_rounds >= RELIST_ROUNDS:
                return True
            grown_bytes = max(self._written_bytes, self._growth_bytes * self._num_rounds)
            return max_bytes is not None and self._listed_bytes + grown_bytes > max_bytes


class Turn:
    """The right to clean up a local store: one process has it until it ends or gives it up.

    Without a path, and where there are no locks or the file is another user's, everybody has it.
    """

    _NO_LOCKS = frozenset(
        {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}
    )

    def __init__(self, path: str | None) -> None:
        self._lock = FileLock(path, timeout=0, thread_local=False) if path else None

    def take(self) -> bool:
        """True when this process has the right now."""
        if self._lock is None or self._lock.is_locked:
            return True
        try:
            self._lock.acquire()
        except Timeout:
            return False
        except NotImplementedError:
            self._lock = None
        except OSError as error:
            if error.errno not in self._NO_LOCKS:
                raise
            self._lock = None
        return True

    def give_up(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            self._lock.release()


def _lock_path(url: str | None) -> str | None:
    """Where processes agree on who cleans up the store at `url`; None unless it is local."""
    protocol, _, path = (url or "").rpartition("://")
    if not path or protocol not in ("", "file", "local"):
        return None
    return os.path.join(os.path.abspath(os.path.expanduser(path)), LOCK_NAME)
