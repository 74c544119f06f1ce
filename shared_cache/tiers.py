"""The tiers behind host memory: a node-local disk, the shared tier, or only one of them.

They are asked nearest first, and each has its own threads, its own guards and its own counters: a
disk that hangs must not take the shared tier with it, and the other way round. What is read from a
far tier is offered to the nearer ones; only the last one, the shared tier, decides whether a block
counts as stored.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shared_cache.config import CacheConfig, TierConfig
from shared_cache.errors import StoreFullError
from shared_cache.faults import Clock, FaultLog, StoreGuard
from shared_cache.hashing import BlockHash
from shared_cache.meters import BusyMeter
from shared_cache.stores.store import BlockRun, BlockStore
from shared_cache.threads import IoThreads, join_all, start_daemon

if TYPE_CHECKING:
    from shared_cache.host.interface import HostTier
    from shared_cache.upkeep.upkeep import Housekeeper

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""How long closing a cache waits for all store calls that are under way."""

MIN_PATIENCE_S = 1.0
"""The shortest time without any answer after which a tier counts as hanging."""

NEAR_SHARE = 0.25
"""Part of the staging deadline that a tier may take to answer when another one is behind it."""

SawRead = Callable[[str, int, float, float], None]
"""Told of every good read: tier, bytes, seconds, and how many reads shared the tier on average."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of one tier since the start; bytes are those of blocks, before any codec.

    `read_s` and `write_s` are the seconds in which at least one such call was under way.
    `declined_blocks` were not worth writing there, `dropped_blocks` found no room in the queue or
    failed. Corrupt, foreign and vanished objects were misses; `retries` may have been served.
    """

    url: str
    read_blocks: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    written_blocks: int = 0
    written_bytes: int = 0
    write_s: float = 0.0
    dropped_blocks: int = 0
    declined_blocks: int = 0
    faults: int = 0
    corrupt_objects: int = 0
    foreign_objects: int = 0
    vanished_objects: int = 0
    retries: int = 0


class Tier:
    """One store of the list: asked through its guards, in its threads; nothing here raises for it.

    `is_shared` is True for the last one. `on_read` is told how long good reads took.
    """

    def __init__(
        self,
        store: BlockStore,
        config: TierConfig,
        is_shared: bool,
        guards: tuple[StoreGuard, StoreGuard],
        num_threads: int,
        all_reads: BusyMeter,
    ) -> None:
        """`guards` are those for reading and for writing; `all_reads` counts all tiers together."""
        self.url = config.url
        self.admission = config.admission
        self.is_shared = is_shared
        self.reading, self.writing = guards
        self.threads = IoThreads(num_threads, "kvcommons-fetch")
        self.reading.on_lost = self.threads.crew.replace
        self.on_read: SawRead | None = None
        self.store = store
        self._housekeeper = _housekeeper(store, config)
        self._all_reads = all_reads
        self._reads = BusyMeter()
        self._writes = BusyMeter()
        self._read_blocks = 0

    @property
    def may_write(self) -> bool:
        """Whether anything is ever written to this tier."""
        return not (self.store.read_only or self.admission == "never")

    @property
    def blocks_per_read(self) -> int:
        """The most blocks that one read should ask for, where a run has enough of them."""
        return self.store.read_bytes // self.store.namespace.layout.block_bytes

    @property
    def read_blocks(self) -> int:
        """Verified blocks that came from here."""
        return self._read_blocks

    @property
    def num_in_flight(self) -> int:
        """Reads that are under way."""
        return self._reads.num_running

    def num_stored(self, chain: Sequence[BlockHash], start: int) -> int:
        """How many blocks of `chain` from `start` on are stored here; 0 for a tier in trouble."""
        if not self.reading.usable():
            return 0
        num_found = 0
        with self.reading.operation("match", partial(self.store.match, chain)):
            num_found = self.store.match(chain) - start
            if num_found < 0:  # the beginning is not stored, the run may be all the same
                num_found = self.store.match(chain[start:])
        return max(0, min(num_found, len(chain) - start))

    def read_into(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        """The checksums of the leading blocks that were read and verified."""
        checksums: tuple[int, ...] = ()
        with (
            self._all_reads.running(),
            self._reads.running() as call,
            self.reading.operation("read", partial(self._read_again, hashes[:1])),
        ):
            checksums = self.store.read_into(hashes, buffers)[: len(hashes)]
        with self._reads.lock:
            self._read_blocks += len(checksums)
        if self.on_read is not None and len(checksums) == len(hashes):
            num_bytes = sum(buffer.nbytes for buffer in buffers)
            self.on_read(self.url, num_bytes, call.seconds, call.num_in_flight)
        return checksums

    def _read_again(self, hashes: Sequence[BlockHash]) -> None:
        """Read what a read hangs over, into memory of its own: does the store read at all?"""
        block_bytes = self.store.namespace.layout.block_bytes
        self.store.read_into(hashes, [memoryview(bytearray(block_bytes)) for _ in hashes])

    def write(self, run: BlockRun) -> int:
        """See `BlockStore.write`; raises what the store raises: call it in `writing.operation`."""
        try:
            with self._writes.running():
                num_written = self.store.write(run)
        except StoreFullError:
            if self._housekeeper is not None:
                self._housekeeper.found_full()
            raise
        if self._housekeeper is not None:
            self._housekeeper.written(num_written * self.store.namespace.layout.block_bytes)
        return num_written

    def stats(self, num_written: int = 0, num_dropped: int = 0, num_declined: int = 0) -> TierStats:
        """The counters; those of writing come from whoever queues the writes."""
        block_bytes = self.store.namespace.layout.block_bytes
        objects = self.store.faults
        return TierStats(
            url=self.url,
            read_blocks=self._read_blocks,
            read_bytes=self._read_blocks * block_bytes,
            read_s=self._reads.busy_s,
            written_blocks=num_written,
            written_bytes=num_written * block_bytes,
            write_s=self._writes.busy_s,
            dropped_blocks=num_dropped,
            declined_blocks=num_declined,
            faults=self.reading.num_faults
            + self.writing.num_faults
            + (self._housekeeper.num_faults if self._housekeeper else 0),
            corrupt_objects=objects.corrupt,
            foreign_objects=objects.foreign,
            vanished_objects=objects.vanished,
            retries=self.store.num_retries,
        )

    def protect(self, host: "HostTier") -> None:
        """Never delete from the shared tier what `host` has in use."""
        if self._housekeeper is not None and self.is_shared:
            self._housekeeper.protect(host)

    def close_store(self) -> None:
        """Stop looking after the store, and give back what it holds."""
        if self._housekeeper is not None:
            self._housekeeper.close()
        self.store.close()


class TieredStore:
    """The tiers of one cache, nearest first; may be none."""

    def __init__(
        self, stores: Sequence[BlockStore], config: CacheConfig, faults: FaultLog, clock: Clock
    ) -> None:
        """`stores` are those of `config.all_tiers`, in the same order."""
        last = len(stores) - 1
        self._faults = faults
        self._reads = BusyMeter()
        self.tiers = tuple(
            Tier(
                store,
                tier_config,
                index == last,
                _guards(tier_config, config.staging_deadline_s, index == last, faults, clock),
                config.io_threads,
                self._reads,
            )
            for index, (store, tier_config) in enumerate(zip(stores, config.all_tiers, strict=True))
        )

    @property
    def shared(self) -> Tier | None:
        """The last tier; None when there is none at all."""
        return self.tiers[-1] if self.tiers else None

    @property
    def read_s(self) -> float:
        """Seconds in which at least one read of any tier was under way."""
        return self._reads.busy_s

    def nearest(self) -> Tier | None:
        """The first tier that may be asked now; None when all are better left alone."""
        return next((tier for tier in self.tiers if tier.reading.usable()), None)

    def behind(self, tier: Tier) -> Tier | None:
        """The next tier behind `tier` that may be asked now."""
        place = self.tiers.index(tier) + 1
        return next((tier for tier in self.tiers[place:] if tier.reading.usable()), None)

    def before(self, tier: Tier) -> tuple[Tier, ...]:
        """The tiers nearer than `tier`."""
        return self.tiers[: self.tiers.index(tier)]

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that run still; they may write into slots that are reserved for it."""
        return [thread for tier in self.tiers for thread in tier.threads.crew.threads]

    def close_threads(self) -> None:
        """Read nothing from now on; waits for nothing."""
        for tier in self.tiers:
            tier.threads.stop()

    def close_stores(self, deadline_s: float) -> None:
        """Give back what the stores hold; one that hangs is waited for until `deadline_s`."""
        closing = [
            start_daemon(partial(self._close, tier), "kvcommons-close") for tier in self.tiers
        ]
        if not join_all([thread for thread in closing if thread is not None], deadline_s):
            logger.warning("closing a store takes too long; it is left behind")

    def _close(self, tier: Tier) -> None:
        with self._faults.caught(f"closing {tier.url}"):
            tier.close_store()


def _housekeeper(store: BlockStore, config: TierConfig) -> "Housekeeper | None":
    """Who keeps the store within its limits from now on; None where there are none."""
    if config.max_bytes is None and config.max_age_s is None:
        return None
    # Imported here: it brings all that can list and delete in a store.
    from shared_cache.upkeep.upkeep import keep_house

    housekeeper = keep_house(store, config)
    if housekeeper is not None:
        housekeeper.start()
    return housekeeper


def _guards(
    config: TierConfig, deadline_s: float, is_last: bool, faults: FaultLog, clock: Clock
) -> tuple[StoreGuard, StoreGuard]:
    """Reading is given up when nothing has come for a whole deadline; writing keeps nobody waiting.

    A tier with another one behind it gets a part of the deadline, so that the other is asked in
    time.
    """
    patience_s = max(MIN_PATIENCE_S, deadline_s) * (1 if is_last else NEAR_SHARE)
    patiences_s = {"reading": min(config.timeout_s, patience_s), "writing": config.timeout_s}
    reading, writing = (
        StoreGuard(f"{config.url} ({verb})", seconds, faults, clock)
        for verb, seconds in patiences_s.items()
    )
    return reading, writing
