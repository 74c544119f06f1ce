"""Fetching through the cache itself: one process that stages a prefix again and again.

What it spends where is counted from outside: the product's calls are wrapped, and its two locks are
replaced by ones that count how long taking them takes.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.cases.page_cache import Took, timed
from benchmarks.cases.phases import Phases, Place, places, replaced
from shared_cache.config import CacheConfig
from shared_cache.connector.copier import make_copier
from shared_cache.connector.copies import BlockLoad
from shared_cache.hashing import BlockHash
from shared_cache.namespace import Namespace
from shared_cache.opening import open_cache

SETTLE_S = 0.02
"""For threads that have just delivered the last block to become idle."""

PHASES = {
    "look-up in the store": ("FsBlockStore.match",),
    "owner's answers": ("OwnerLink.ask",),
    "claim": ("NodeHostTier.claim",),
    "commit": ("NodeHostTier.commit",),
    "lease, release": ("NodeHostTier.lease", "NodeHostTier.lease_held", "NodeHostTier.release"),
    "open, ask for page cache, close": (
        "LocalMedium.open",
        "_LocalReader.is_in_memory",
        "_LocalReader.note_use",
        "_LocalReader.close",
    ),
    "read": ("_LocalReader.fill",),
    "hash": ("checksum_of_pieces", "block_checksum"),
    "read by the reader process": ("ReaderProcess._is_good",),
    "share among helpers": ("run_all",),
    "store, the rest": ("FsBlockStore.read_into",),
    "tier, the rest": ("Tier.read_into",),
    "piece, the rest": ("PieceReader.read",),
    "fetch, the rest": ("Fetcher._read_piece", "Fetcher._look_up", "Fetcher.join"),
    "requester waits for the end": ("Fetcher.wait",),
}
"""Callables of the product by phase; a name that is not there is left out.

Hashing counts without the reads between its pieces, sharing without the shared jobs done meanwhile
by the same thread: what is left of it is waiting for the helpers.
"""

FETCH_LOCK, SESSION_LOCK = "lock of the fetches", "lock of the session"


class CountedCondition(threading.Condition):
    """A condition that counts how long taking its lock takes, but for the end of a wait."""

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self._take = phases.wrapped(super().__enter__, FETCH_LOCK)

    def __enter__(self) -> bool:
        return bool(self._take())


class CountedLock:
    """A lock that counts how long taking it takes."""

    def __init__(self, phases: Phases) -> None:
        self._lock = threading.Lock()
        self._take = phases.wrapped(self._lock.acquire, SESSION_LOCK)

    def __enter__(self) -> bool:
        return bool(self._take())

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Stager:
    """Stages the blocks `names`, which some tier has, and forgets them again.

    With `pool`, `[len(names), block_bytes]` of uint8, they can be copied to it.
    """

    def __init__(
        self,
        config: CacheConfig,
        space: Namespace,
        names: Sequence[BlockHash],
        pool: torch.Tensor | None = None,
    ) -> None:
        self._cache = open_cache(config, space)
        self._names = names
        self._copier = None if pool is None else make_copier(pool)
        self._stream = torch.cuda.current_stream() if pool is not None and pool.is_cuda else None
        prepare = (lambda memory: None) if self._copier is None else self._copier.prepare
        self._cache.host.show_memory(prepare)  # takes all of it, where the arena is populated

    def stage(self) -> Took:
        """As a request does it when nothing is known of the store's objects yet."""
        return self._timed(lambda staged: None)

    def stage_and_load(self) -> Took:
        """The same, and the copies to the pool, until they are done."""
        return self._timed(self._load)

    def load(self) -> Took:
        """The copies to the pool alone."""
        staged = self._stage()
        took = timed(partial(self._load, staged))
        self._forget(staged)
        return took

    @contextmanager
    def counting(self, phases: Phases) -> Iterator[None]:
        """Count what the calls of the block take, by phase; nothing else may use the cache."""
        wrapped = [
            (place, phases.wrapped(place.get(), phase))
            for phase, names in PHASES.items()
            for name in names
            for place in places(name, ("shared_cache.",))
        ]
        with replaced([*wrapped, *self._counted_locks(phases)]):
            phases.is_on = True
            yield
            phases.is_on = False

    def close(self) -> None:
        if self._copier is not None:  # first: it has pinned memory of the arena
            self._copier.close()
        self._cache.close()

    def _counted_locks(self, phases: Phases) -> list[tuple[Place, Any]]:
        fetcher = getattr(self._cache, "_fetcher", None)
        session = getattr(self._cache.host, "_session", None)
        locks = (
            (Place(fetcher, "_changed"), CountedCondition(phases)),
            (Place(session, "lock"), CountedLock(phases)),
        )
        return [(place, lock) for place, lock in locks if hasattr(place.owner, place.name)]

    def _timed(self, then: Any) -> Took:
        staged: list[Any] = []

        def run() -> None:
            staged.append(self._stage())
            then(staged[0])

        self._forget_heads()
        took = timed(run)
        self._forget(staged[0])
        return took

    def _stage(self) -> Any:
        staged = self._cache.stage(self._names)
        if len(staged.fetched) != len(self._names):
            raise SystemExit(f"{len(staged.fetched)} of {len(self._names)} blocks were fetched")
        return staged

    def _load(self, staged: Any) -> None:
        assert self._copier is not None
        (place,) = self._cache.places(staged)
        blocks = BlockLoad(self._cache.host.blocks_at(place), range(len(self._names)))
        self._copier.load([blocks], self._stream)
        if self._stream is not None:
            self._stream.synchronize()

    def _forget(self, staged: Any) -> None:
        self._cache.release(staged)
        time.sleep(SETTLE_S)
        if self._cache.host.drop(self._names) != len(self._names):
            raise SystemExit("the arena did not forget the blocks")

    def _forget_heads(self) -> None:
        known = getattr(getattr(self._cache.shared_store, "_runs", None), "known", None)
        for name in known.names() if known is not None else ():
            known.forget(name)
