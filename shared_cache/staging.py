"""Staging: the fallible part of a cache hit, done while the request waits outside the engine.

TensorRT-LLM's connector interface has no way to say "this load failed": tokens once promised count
as computed. So everything that can fail (fetch, length, checksum, namespace) happens here, before
the engine hears of the blocks; what is offered afterwards is verified, in this node's memory and
leased. Any fault of any store is then a shorter prefix, never an exception in the engine's step.

Saves go the other way in the background, through a bounded queue that drops under pressure.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shared_cache.config import CacheConfig
from shared_cache.errors import ConfigError, StoreError
from shared_cache.faults import Clock, FaultLog, StoreGuard
from shared_cache.fetching import Fetcher
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostStats, HostTier
from shared_cache.host.local import LocalHostTier
from shared_cache.namespace import Namespace
from shared_cache.saving import SaveCounts, SaveQueue
from shared_cache.store import BlockStore

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StagedPrefix:
    """Consecutive blocks of a request, from block `first` on, verified in host memory and leased.

    `fetched` holds the indices, counted from block 0, of the blocks that this request waited for
    from the shared tier; the others were in host memory already.
    """

    lease: HostLease
    fetched: frozenset[int]
    first: int = 0

    @property
    def num_blocks(self) -> int:
        """How many blocks are staged."""
        return len(self.lease.slots)

    @property
    def end(self) -> int:
        """The index behind the last staged block."""
        return self.first + self.num_blocks


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of one replica's cache since its start.

    All but `host` and `pending_saves` only grow.
    `fetch_s` are the seconds in which at least one read of the shared tier was under way.
    `saved_blocks` were written (those that the store had already do not count), `dropped_saves` and
    `pending_saves` are blocks too. `deadline_misses` are requests that ran out of time.
    """

    host: HostStats
    staged_blocks: int
    fetched_blocks: int
    fetched_bytes: int
    fetch_s: float
    deadline_misses: int
    saved_blocks: int
    saved_bytes: int
    dropped_saves: int
    store_faults: int
    pending_saves: int


class SharedCache:
    """One replica's view of the cache: a host tier, the shared tier behind it, and what moves.

    Thread-safe. Call `close` at the end; the interpreter's exit does it for those who forget.
    """

    def __init__(
        self,
        host: HostTier,
        store: BlockStore | None,
        config: CacheConfig,
        clock: Clock = time.monotonic,
    ) -> None:
        self.host = host
        self._store = store
        self.deadline_s = config.staging_deadline_s
        self._lock = threading.Lock()
        self._staged_blocks = 0
        self._deadline_misses = 0
        self._faults = FaultLog(logger, clock)
        self._fetcher: Fetcher | None = None
        self._saves: SaveQueue | None = None
        self._lost_saves = 0
        if store is not None:
            reads, writes = (
                StoreGuard(f"the shared tier ({verb})", config.store_timeout_s, self._faults, clock)
                for verb in ("reading", "writing")
            )
            self._fetcher = Fetcher(host, store, reads, config.io_threads)
            if not store.read_only:
                self._saves = SaveQueue(
                    host, store, writes, config.save_queue_bytes, config.io_threads
                )
        atexit.register(self.close)

    def stage(self, hashes: Sequence[BlockHash], deadline_s: float | None = None) -> StagedPrefix:
        """Bring the leading blocks of `hashes` into host memory and lease them: `lease`, `grow`."""
        return self.grow(self.lease(hashes), hashes, deadline_s)

    def lease(self, hashes: Sequence[BlockHash], first: int = 0) -> StagedPrefix:
        """Lease what host memory holds of `hashes` from block `first` on; a look-up, never waits.

        The blocks before `first` need not be here: the engine has them. Release with `release`.
        """
        lease = self.host.lease(hashes[first:])
        with self._lock:
            self._staged_blocks += len(lease.slots)
        return StagedPrefix(lease, frozenset(), first)

    def can_fetch(self, hashes: Sequence[BlockHash], start: int) -> bool:
        """Whether blocks from `start` on could come from the shared tier; without asking it."""
        return self._fetcher is not None and start < len(hashes)

    def grow(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], deadline_s: float | None = None
    ) -> StagedPrefix:
        """Fetch what `staged` lacks of `hashes` from the shared tier; takes over `staged`.

        Blocks the caller for at most `deadline_s` (default: the configured one); what has not
        arrived by then keeps coming in the background for a later request. Concurrent calls fetch
        a block once. Never raises for a fault of the store. Release the result with `release`.
        """
        if self._fetcher is None or staged.end == len(hashes):
            return staged
        wait_s = self.deadline_s if deadline_s is None else deadline_s
        grown = self._fetch(self._fetcher, staged, hashes, time.monotonic() + wait_s)
        with self._lock:
            self._staged_blocks += max(0, grown.num_blocks - staged.num_blocks)
        return grown

    def release(self, staged: StagedPrefix) -> None:
        """End the lease of `stage`; a second release is a no-op."""
        self.host.release(staged.lease)

    def reserve(self, num_blocks: int) -> tuple[int, ...]:
        """Host slots to write up to `num_blocks` blocks into for `save`; never waits.

        Blocks for which there is no slot are counted as dropped. Give unused slots back with
        `host.cancel`.
        """
        slots = self.host.reserve(num_blocks)
        with self._lock:
            self._lost_saves += num_blocks - len(slots)
        return slots

    def save(self, slots: Sequence[int], parent: BlockHash, hashes: Sequence[BlockHash]) -> None:
        """Take reserved, written host slots: publish them and write them to the shared tier.

        Returns at once and never raises for a fault of the store; under pressure the write is
        dropped and counted, the blocks stay in host memory.
        """
        lease = self.host.commit(slots, hashes)
        if self._saves is None:
            self.host.release(lease)
        else:
            self._saves.put(lease, parent, hashes)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every queued save is written; False when time ran out."""
        return self._saves is None or self._saves.flush(timeout_s)

    def stats(self) -> CacheStats:
        """A snapshot; cheap."""
        host = self.host.stats()
        fetched = self._fetcher.fetched_blocks if self._fetcher else 0
        saves = self._saves.counts if self._saves else SaveCounts(0, 0, 0)
        with self._lock:
            return CacheStats(
                host=host,
                staged_blocks=self._staged_blocks,
                fetched_blocks=fetched,
                fetched_bytes=fetched * host.block_bytes,
                fetch_s=self._fetcher.busy_s if self._fetcher else 0.0,
                deadline_misses=self._deadline_misses,
                saved_blocks=saves.saved,
                saved_bytes=saves.saved * host.block_bytes,
                dropped_saves=saves.dropped + self._lost_saves,
                store_faults=self._faults.num_faults,
                pending_saves=saves.pending,
            )

    def close(self) -> None:
        """Stop the threads and close the store; queued saves are dropped (call `flush` before)."""
        atexit.unregister(self.close)
        with self._lock:
            store, self._store = self._store, None
        if self._saves is not None:
            self._saves.close()
        if self._fetcher is not None:
            self._fetcher.close()
        if store is not None:
            store.close()

    def _fetch(
        self, fetcher: Fetcher, held: StagedPrefix, hashes: Sequence[BlockHash], deadline_s: float
    ) -> StagedPrefix:
        """Fetch what `held` lacks; one lease over all that is there in the end, and what came.

        The new lease is taken before the old ones end, so nothing is evicted in between.
        """
        tickets = fetcher.join(hashes, held.end)
        is_decided = fetcher.wait(tickets, deadline_s)
        lease = self.host.lease(hashes[held.first :])
        delivered = fetcher.leave(tickets)
        self.host.release(held.lease)
        if not is_decided:
            with self._lock:
                self._deadline_misses += 1
        waited_for = range(held.end, held.first + len(lease.slots))
        fetched = frozenset(i for i in waited_for if hashes[i] in delivered)
        return StagedPrefix(lease, fetched, held.first)


def open_cache(config: CacheConfig, namespace: Namespace) -> SharedCache:
    """The cache that `config` describes, for one replica.

    Raises `ConfigError` when the store's URL or options are wrong, or the store cannot be reached
    or is not a place to write to (the text says how to mend it). A store that may only be read
    is used for reading, with a warning.
    """
    host = LocalHostTier(config.host_bytes, namespace.layout.block_bytes)
    store = None if config.store is None else _open_store(config.store, namespace, config)
    if store is not None and store.read_only:
        logger.warning(
            "cache.store %s may only be read: new blocks stay on this machine", config.store
        )
    return SharedCache(host, store, config)


def _open_store(url: str, namespace: Namespace, config: CacheConfig) -> BlockStore:
    # Imported here so that a cache without a shared tier does not load fsspec.
    from shared_cache.fs_store import open_store

    try:
        return _within(
            config.store_timeout_s, lambda: open_store(url, namespace, config.store_options)
        )
    except TimeoutError as error:
        raise ConfigError(
            f"cache.store {url} did not answer within {config.store_timeout_s:g} s; check the "
            "address and the network, raise cache.store_timeout_s, or set cache.store to null"
        ) from error
    except StoreError as error:
        raise ConfigError(
            f"cache.store {url} cannot be used: {error}; mend it, or set cache.store to null to "
            "share nothing beyond this replica"
        ) from error


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """The result of `call`; `TimeoutError` when it takes longer, and it is left behind."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="kvcommons-open", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    if errors:
        raise errors[0]
    return results[0]
