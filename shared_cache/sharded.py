"""The cache of an engine on several devices: one shard of every block for each of them.

Each rank's shards are a namespace of their own, in the same arena and the same stores. A prefix is
of use only as far as every rank has it: promised by what one rank has, the others would attend to
garbage. So all shards are staged together, with one deadline, by the process that is asked for the
match, and what counts is the shortest. A shard whose store fails makes the prefix shorter for all,
and nothing else.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from shared_cache.cache_stats import CacheStats
from shared_cache.config import CacheConfig
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope
from shared_cache.host.interface import HostLease, Place
from shared_cache.pacing import TurnBudget
from shared_cache.shard_stats import whole_stats
from shared_cache.staged import StagedPrefix
from shared_cache.staging import SharedCache
from shared_cache.threads import join_all, start_daemon
from shared_cache.tiers import CLOSE_TIMEOUT_S

LOOK_UP_S = 1.0
"""After so long no further shard is asked what it has: the owner that all of them ask hangs."""

NO_LEASE = HostLease(0, ())


def shard_config(config: CacheConfig, num_shards: int) -> CacheConfig:
    """The settings of one of `num_shards` caches in one process, which share what is limited."""
    bandwidth = config.cost.max_fetch_bytes_per_s
    shared_bandwidth = None if bandwidth is None else max(1, bandwidth // num_shards)
    cost = config.cost.model_copy(update={"max_fetch_bytes_per_s": shared_bandwidth})
    update = {
        "cost": cost,
        "io_threads": -(-config.io_threads // num_shards),
        "save_queue_bytes": type(config.save_queue_bytes)(config.save_queue_bytes // num_shards),
    }
    return config.model_copy(update=update)


class ShardedCache:
    """A `PrefixCache` over one cache for each rank, rank 0 first; closed with this.

    Blocks are counted whole: all shards of a block together are one.
    """

    def __init__(self, shards: Sequence[SharedCache]) -> None:
        """`shards` differ in the rank of their namespace only; there is at least one."""
        if not shards:
            raise ValueError("a cache needs at least one shard")
        self.shards = tuple(shards)
        self.deadline_s = shards[0].deadline_s

    @property
    def is_flush_hopeless(self) -> bool:
        """See `PrefixCache.is_flush_hopeless`."""
        return any(shard.is_flush_hopeless for shard in self.shards)

    @property
    def turn_budget(self) -> TurnBudget:
        """See `PrefixCache.turn_budget`: that of rank 0, as all ranks copy the same blocks."""
        return self.shards[0].turn_budget

    @property
    def num_reserved_ahead(self) -> int | None:
        """See `PrefixCache.num_reserved_ahead`: of this process's shard; the others are alike."""
        return self.shards[0].num_reserved_ahead

    def reserve_more_ahead(self) -> None:
        """See `PrefixCache.reserve_more_ahead`."""
        self.shards[0].reserve_more_ahead()

    @property
    def num_blocks(self) -> int:
        """See `PrefixCache.num_blocks`; the shards share one arena."""
        return min(shard.num_blocks for shard in self.shards) // len(self.shards)

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
        """See `PrefixCache.lease`."""
        until_s = time.monotonic() + LOOK_UP_S
        nothing = StagedPrefix(NO_LEASE, first=first, scope=scope)

        def look_up(shard: SharedCache) -> StagedPrefix:
            return shard.lease(hashes, first, scope) if time.monotonic() < until_s else nothing

        return self._together(nothing, [partial(look_up, shard) for shard in self.shards])

    def lease_held(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        """See `PrefixCache.lease_held`; no shard leases more than those before it have."""
        nothing, end = StagedPrefix(NO_LEASE, first=first, scope=scope), len(hashes)

        def look_up(shard: SharedCache) -> StagedPrefix:
            nonlocal end
            held = shard.lease_held(hashes[:end], first, scope)
            end = held.end
            return held

        return self._together(nothing, [partial(look_up, shard) for shard in self.shards])

    def lease_coming(
        self, hashes: Sequence[BlockHash], first: int, enough: int, scope: ReuseScope, wait_s: float
    ) -> StagedPrefix:
        """See `PrefixCache.lease_coming`; no shard leases more than those before it have."""
        nothing, end = StagedPrefix(NO_LEASE, first=first, scope=scope), len(hashes)
        until_s = time.monotonic() + wait_s

        def look_up(shard: SharedCache) -> StagedPrefix:
            nonlocal end
            left_s = max(0.0, until_s - time.monotonic())
            held = shard.lease_coming(hashes[:end], first, min(enough, end), scope, left_s)
            end = held.end
            return held

        return self._together(nothing, [partial(look_up, shard) for shard in self.shards])

    def can_fetch(self, hashes: Sequence[BlockHash], start: int) -> bool:
        """See `PrefixCache.can_fetch`."""
        return any(shard.can_fetch(hashes, start) for shard in self.shards)

    def grow(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], deadline_s: float | None = None
    ) -> StagedPrefix:
        """See `PrefixCache.grow`; waits for all shards at the same time.

        What a shard lacks that cannot fetch now, no other one fetches.
        """
        pairs = list(zip(self.shards, staged.shards, strict=False))  # no shards: nothing is staged
        stuck = [part.end for shard, part in pairs if not shard.can_fetch(hashes, part.end)]
        wanted = hashes[: min(stuck, default=len(hashes))]
        until_s = time.monotonic() + (self.deadline_s if deadline_s is None else deadline_s)
        try:
            with ExitStack() as coming:
                growing = (shard.growing(part, wanted, until_s) for shard, part in pairs)
                return self._together(staged, [coming.enter_context(one) for one in growing])
        except BaseException:
            self.release(staged)
            raise

    def places(self, staged: StagedPrefix) -> tuple[Place, ...]:
        """See `PrefixCache.places`."""
        return tuple(
            place
            for shard, part in zip(self.shards, staged.shards, strict=True)
            for place in shard.places(part)
        )

    def release(self, staged: StagedPrefix) -> None:
        """See `PrefixCache.release`."""
        for shard, part in zip(self.shards, staged.shards, strict=False):
            shard.release(part)

    def miss_deadline(self) -> None:
        """See `PrefixCache.miss_deadline`."""
        self.shards[0].miss_deadline()

    def lose(self, num_blocks: int) -> None:
        """See `PrefixCache.lose`; counted once, though every rank loses its shard."""
        self.shards[0].lose(num_blocks)

    def flush(self, timeout_s: float) -> bool:
        """See `PrefixCache.flush`; all shards write at the same time."""
        until_s = time.monotonic() + timeout_s
        done = [shard.flush(max(0.0, until_s - time.monotonic())) for shard in self.shards]
        return all(done)

    def stats(self) -> CacheStats:
        """See `PrefixCache.stats`."""
        return whole_stats([shard.stats() for shard in self.shards])

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """See `PrefixCache.close`; all shards at the same time."""
        until_s = time.monotonic() + timeout_s
        closing = []
        for shard in self.shards:
            thread = start_daemon(partial(shard.close, timeout_s), "kvcommons-close")
            if thread is None:  # the interpreter is ending
                shard.close(timeout_s)
            else:
                closing.append(thread)
        join_all(closing, until_s + CLOSE_TIMEOUT_S)

    def _together(
        self, like: StagedPrefix, calls: Sequence[Callable[[], StagedPrefix]]
    ) -> StagedPrefix:
        """What all shards have by these calls; when one raises, none of them keeps anything."""
        parts: list[StagedPrefix] = []
        try:
            for call in calls:
                parts.append(call())  # noqa: PERF401 - those before an error must be known
        except BaseException:
            for shard, part in zip(self.shards, parts, strict=False):
                shard.release(part)
            raise
        whole = StagedPrefix(NO_LEASE, frozenset(), like.first, like.scope, tuple(parts))
        fetched = frozenset[int]().union(*(part.fetched for part in parts))
        kept = frozenset(index for index in fetched if index < whole.end)
        shortest = min(parts, key=lambda part: part.end, default=like)
        return replace(whole, fetched=kept, missed=shortest.missed, fate=shortest.fate)
