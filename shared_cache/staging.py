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
from shared_cache.faults import Clock, FaultLog
from shared_cache.fetch_state import Ticket, Wish
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
        self.deadline_s = config.staging_deadline_s
        # The tier that processes share checks its blocks by itself.
        self._verifies = config.host.verify_every_load and config.host.scope == "process"
        self._lock = threading.Lock()
        self._is_closed = False
        self.is_flush_hopeless = False  # the last one ran out of time: another one would too
        self._staged_blocks = self._peer_blocks = self._deadline_misses = self._lost_saves = 0
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
        self._publisher = Publisher(
            host, self._tiers, max_blocks, config.io_threads, self._faults, self.gate
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
            run = NewRun(_parent(hashes, first, scope), tuple(hashes[first:]), scope.tenant)
            self._publisher.owe(staged.lease, run, first)
        with self._lock:
            self._staged_blocks += staged.num_blocks
            self._peer_blocks += lease.num_from_peers
        return staged

    def lease_held(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        """Lease once more what this process has leased now, from `first` on; *in the step*."""
        return StagedPrefix(self.host.lease_held(hashes[first:]), first=first, scope=scope)

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
        with self._lock:
            self._deadline_misses += 1

    def release(self, staged: StagedPrefix) -> None:
        """End the lease of `stage`; a second release is a no-op."""
        self.host.release(staged.lease)

    def reserve(self, num_blocks: int) -> tuple[int, ...]:
        """Host slots to write up to `num_blocks` blocks into for `save`; never waits.

        Blocks for which there is no slot are counted as dropped. `flush` waits for each slot until
        it is given to `save` or `give_back`.
        """
        slots = self.host.reserve(num_blocks)
        self._publisher.expect(len(slots))
        self.lose(num_blocks - len(slots))
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Slots of `reserve` that nothing is written to any more; their blocks are dropped."""
        self._publisher.give_back(slots)
        self.lose(len(slots))

    def lose(self, num_blocks: int) -> None:
        """Count blocks that could not be saved: the engine needs their place before their turn."""
        if not num_blocks:
            return
        with self._lock:
            self._lost_saves += num_blocks

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
        host = self.host.stats()
        tiers = self._publisher.tier_stats()
        saves = self._publisher.counts
        gate = self.gate.stats() if tiers else None  # takes milliseconds: not under the lock
        with self._lock:
            return CacheStats(
                host=host,
                staged_blocks=self._staged_blocks,
                fetched_blocks=sum(tier.read_blocks for tier in tiers),
                fetched_bytes=sum(tier.read_bytes for tier in tiers),
                fetch_s=self._tiers.read_s,
                deadline_misses=self._deadline_misses,
                saved_blocks=saves.saved,
                saved_bytes=saves.saved * self.host.block_bytes,
                dropped_saves=saves.dropped + self._lost_saves,
                store_faults=self._faults.num_faults,
                pending_saves=saves.pending,
                peer_blocks=self._peer_blocks + self._fetcher.num_from_peers,
                tiers=tiers,
                gate=gate,
            )

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
            delivered = got.delivered
        self.host.release(held.lease)
        if not got.is_decided:
            self.miss_deadline()
        grown = self._verified(replace(held, lease=lease), hashes, held.end)
        fetched = frozenset(i for i in range(held.end, grown.end) if hashes[i] in delivered)
        with self._lock:
            self._staged_blocks += max(0, grown.num_blocks - held.num_blocks)
        return replace(grown, fetched=fetched)

    def _verified(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], start: int
    ) -> StagedPrefix:
        """`staged` up to the first block from `start` on that is damaged, where that is checked."""
        if not self._verifies:
            return staged
        return verified(staged, hashes, start, self.host, self._faults)


def _parent(hashes: Sequence[BlockHash], first: int, scope: ReuseScope) -> BlockHash:
    return hashes[first - 1] if first else scope.root_hash()
