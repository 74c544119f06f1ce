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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from shared_cache.cache_stats import CacheStats
from shared_cache.config import CacheConfig
from shared_cache.cost import CostGate
from shared_cache.counting import StagingCounter, gathered
from shared_cache.fates import Fates
from shared_cache.faults import Clock, FaultLog
from shared_cache.fetch_state import Ticket, Wish, why_short
from shared_cache.fetching import Fetcher
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope
from shared_cache.host.interface import HostTier, NewRun, Place
from shared_cache.pacing import BandwidthLimit, TurnBudget
from shared_cache.pieces import BLOCKS_PER_PIECE, PieceReader
from shared_cache.publishing import Publisher
from shared_cache.staged import StagedPrefix as StagedPrefix
from shared_cache.staged_checks import verified
from shared_cache.stores.store import BlockStore
from shared_cache.threads import join_all, start_daemon
from shared_cache.tier_speeds import PieceRule
from shared_cache.tiers import CLOSE_TIMEOUT_S, MIN_PATIENCE_S, TieredStore

logger = logging.getLogger(__name__)

PEER_PATIENCE = 0.5
"""Part of the staging deadline that a block is waited for which another process is reading."""


class SharedCache:
    """One replica's view of the cache: a host tier, the tiers behind it, and what moves.

    Thread-safe. `lease`, `grow`, `stage`, `stats`, `flush` and `close` may ask the owner of the
    node's memory or wait for a tier: they are not for an event loop or an engine's step. The
    others never wait.
    Call `close` at the end; the interpreter's exit does it for those who forget.
    """

    def __init__(
        self,
        host: HostTier,
        stores: Sequence[BlockStore],
        config: CacheConfig,
        clock: Clock = time.monotonic,
    ) -> None:
        """`stores` are those of `config.all_tiers`, in the same order; all are closed with this."""
        self.host = host
        self.config = config
        self.deadline_s = config.staging_deadline_s
        # The tier that processes share checks its blocks by itself.
        self._verifies = config.host.verify_every_load and config.host.scope == "process"
        self._lock = threading.Lock()
        self._is_closed = False
        self.is_flush_hopeless = False  # the last one ran out of time: another one would too
        self._counts = StagingCounter()
        self._faults = FaultLog(logger, clock)
        self._tiers = TieredStore(stores, config, self._faults, clock)
        self._tokens_per_block = stores[0].namespace.layout.tokens_per_block if stores else 1
        rule = PieceRule(host.block_bytes, BLOCKS_PER_PIECE, config.io_threads)
        budget = BandwidthLimit(config.cost.max_fetch_bytes_per_s)
        self.gate = CostGate(self._tokens_per_block, rule, config.cost.gate, budget=budget)
        self.turn_budget = TurnBudget(config.cost.max_save_share)
        for tier in self._tiers.tiers:
            tier.on_read = self.gate.saw_fetch
            tier.protect(host)
        max_blocks = min(config.save_queue_bytes // host.block_bytes, max(1, host.num_slots // 2))
        self.fates = Fates()
        self._publisher = Publisher(
            host, self._tiers, max_blocks, config.io_threads, self._faults, self.gate, self.fates
        )
        reader = PieceReader(
            host,
            budget,
            max(MIN_PATIENCE_S, self.deadline_s) * PEER_PATIENCE,
            self._publisher.promote,
        )
        self._fetcher = Fetcher(host, self._tiers, reader, config.io_threads, self.gate)
        atexit.register(self.close)

    @property
    def shared_store(self) -> BlockStore | None:
        """The store of the shared tier, for administration: its guards do not stand before it."""
        return None if self._tiers.shared is None else self._tiers.shared.store

    @property
    def num_blocks(self) -> int:
        """Blocks that host memory could hold; asks nobody."""
        return self.host.num_slots

    def stage(
        self,
        hashes: Sequence[BlockHash],
        deadline_s: float | None = None,
        scope: ReuseScope = DEFAULT_SCOPE,
    ) -> StagedPrefix:
        """Bring the leading blocks of `hashes` into host memory and lease them: `lease`, `grow`."""
        return self.grow(self.lease(hashes, scope=scope), hashes, deadline_s)

    def lease(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        """Lease what host memory holds of `hashes` from block `first` on; asks no store.

        `hashes` are those of a prompt in `scope`. The blocks before `first` need not be here: the
        engine has them. Release with `release`.
        """
        lease = self.host.lease(hashes, first)
        staged = self._verified(StagedPrefix(lease, frozenset(), first, scope), hashes, first)
        if staged.lease.to_store:
            run = NewRun(scope.parent_of(hashes, first), tuple(hashes[first:]), scope.tenant)
            self._publisher.owe(staged.lease, run, first)
        self._counts.add(staged_blocks=staged.num_blocks, peer_blocks=lease.num_from_peers)
        return staged

    def lease_held(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        """Lease once more what this process has leased now, from `first` on; *in the step*."""
        return StagedPrefix(self.host.lease_held(hashes[first:]), first=first, scope=scope)

    def lease_coming(
        self, hashes: Sequence[BlockHash], first: int, enough: int, scope: ReuseScope, wait_s: float
    ) -> StagedPrefix:
        """See `PrefixCache.lease_coming`."""
        until_s = time.monotonic() + wait_s
        tickets = self._fetcher.coming(hashes[:enough], first)
        try:
            self._fetcher.wait(tickets, until_s)
            held = self.lease_held(hashes, first, scope)
        finally:
            self._fetcher.leave(tickets)
        return self._verified(held, hashes, first)

    def places(self, staged: StagedPrefix) -> tuple[Place, ...]:
        """Where the staged blocks lie: one place, as there is one shard; *in the step*."""
        return (self.host.place(staged.lease.slots),)

    def can_fetch(self, hashes: Sequence[BlockHash], start: int) -> bool:
        """Whether blocks from `start` on could come from a tier now; without asking any."""
        return start < len(hashes) and self._tiers.nearest() is not None

    def grow(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], deadline_s: float | None = None
    ) -> StagedPrefix:
        """Fetch what `staged` lacks of `hashes` and is worth it; takes over `staged`.

        Blocks the caller for at most `deadline_s` (default: the configured one); what has not
        arrived by then keeps coming in the background for a later request. Concurrent calls fetch
        a block once. Never raises for a fault of a store. Release the result with `release`.
        """
        wait_s = self.deadline_s if deadline_s is None else deadline_s
        with self.growing(staged, hashes, time.monotonic() + wait_s) as grown:
            return grown()

    @contextmanager
    def growing(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], until_s: float
    ) -> Iterator[Callable[[], StagedPrefix]]:
        """`grow` in two steps, for who grows several caches at once.

        From here on the blocks are on their way; calling what this gives waits for them and takes
        over `staged`. Call it once, and in the block.
        """
        if not self.can_fetch(hashes, staged.end):
            yield lambda: staged
            return
        num_tokens = len(hashes) * self._tokens_per_block + 1
        wish = Wish(hashes, staged.end, staged.scope, until_s, num_tokens)
        tickets = self._fetcher.join(wish)
        try:
            yield partial(self._grown, staged, wish, tickets)
        finally:
            self._fetcher.leave(tickets)

    def miss_deadline(self) -> None:
        """Count a request whose time ran out, perhaps before it was its turn to `grow`."""
        self._counts.add(deadline_misses=1)

    def release(self, staged: StagedPrefix) -> None:
        """End the lease of `stage`; a second release is a no-op."""
        self.host.release(staged.lease)

    @property
    def num_reserved_ahead(self) -> int | None:
        """See `PrefixCache.num_reserved_ahead`."""
        return self.host.num_reserved_ahead

    def reserve_more_ahead(self) -> None:
        """See `PrefixCache.reserve_more_ahead`."""
        self.host.reserve_more_ahead()

    def reserve(self, num_blocks: int) -> tuple[int, ...]:
        """Host slots to write up to `num_blocks` blocks into for `save`; never waits.

        Blocks for which there is no slot are counted as dropped. `flush` waits for each slot until
        it is given to `save` or `give_back`.
        """
        return self._publisher.reserve(num_blocks)

    def give_back(self, slots: Sequence[int]) -> None:
        """Slots of `reserve` that nothing is written to any more; their blocks are dropped."""
        self._publisher.give_back(slots)

    def lose(self, num_blocks: int) -> None:
        """Count blocks that could not be saved: the engine needs their place before their turn."""
        self._publisher.lose(num_blocks)

    def save(self, slots: Sequence[int], run: NewRun, first: int = 0) -> None:
        """Take reserved slots that hold the blocks of `run`: publish them, and have them stored.

        `first` is the place of the run in its prompt. Returns at once and never raises for a fault
        of host tier or store; under pressure the write is dropped and counted, the blocks stay in
        host memory.
        """
        self._publisher.publish(slots, run, first)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every save is published and written; False when time ran out."""
        self.is_flush_hopeless = not self._publisher.flush(timeout_s)
        return not self.is_flush_hopeless

    def stats(self) -> CacheStats:
        """A snapshot; may ask the owner of the node's memory."""
        counts = self._counts.counts
        peer_blocks = counts.peer_blocks + self._fetcher.num_from_peers
        counts = replace(counts, peer_blocks=peer_blocks)
        num_faults = self._faults.num_faults
        return gathered(self.host, self._publisher, self._tiers, self.gate, counts, num_faults)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop threads, close tiers and host tier; queued saves are dropped: `flush` first.

        A store call that is stuck for longer than `timeout_s` is left behind, and the host tier
        then stays open until it ends: it may write into our slots, which must not become another
        process's before.
        """
        atexit.unregister(self.close)
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return
        deadline_s = time.monotonic() + timeout_s
        self._publisher.close()
        self._fetcher.close()
        threads = [*self._publisher.threads, *self._tiers.threads]
        if join_all(threads, deadline_s):
            self._give_back(deadline_s)
            return
        logger.warning("a store call is stuck: its memory is given back when it ends")
        start_daemon(partial(self._give_back_after, threads), "kvcommons-close")

    def _give_back_after(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            thread.join()
        self._give_back(time.monotonic() + CLOSE_TIMEOUT_S)

    def _give_back(self, deadline_s: float) -> None:
        """Close host tier and stores, now that nothing of ours uses them any more."""
        try:
            self.host.close()
        finally:
            self._tiers.close_stores(deadline_s)

    def _grown(self, held: StagedPrefix, wish: Wish, tickets: Sequence[Ticket]) -> StagedPrefix:
        """What `held` has and what came; one lease over all that is there in the end.

        The new lease is taken before the old ones end, so nothing is evicted in between.
        """
        hashes = wish.chain
        with self._fetcher.fetched(wish, tickets) as got:
            lease = self.host.lease_held(hashes[held.first :])
            delivered, end = got.delivered, held.first + len(lease.slots)
            is_short = end < len(hashes)
            missed = why_short(got.tickets, end, got.is_decided) if is_short else None
            fate = self.fates.of(hashes[end]) if is_short else None
        self.host.release(held.lease)
        if not got.is_decided:
            self.miss_deadline()
        grown = replace(held, lease=lease, missed=missed, fate=fate)
        grown = self._verified(grown, hashes, held.end)
        fetched = frozenset(i for i in range(held.end, grown.end) if hashes[i] in delivered)
        self._counts.add(staged_blocks=max(0, grown.num_blocks - held.num_blocks))
        return replace(grown, fetched=fetched)

    def _verified(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], start: int
    ) -> StagedPrefix:
        """`staged` up to the first block from `start` on that is damaged, where that is checked."""
        if not self._verifies:
            return staged
        return verified(staged, hashes, start, self.host, self._faults)
