"""What a connector, a replica and its admission need of a cache, in one shard or in several.

An engine on one device has one `SharedCache`. One on several devices has as many shards of every
block, each in a namespace of its own (`ShardedCache`). Who stages and who matches must not see the
difference: where they did, a prefix could be promised of which one device lacks a part.
"""

from collections.abc import Sequence
from typing import Protocol

from shared_cache.cache_stats import CacheStats
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope
from shared_cache.host.interface import Place
from shared_cache.pacing import TurnBudget
from shared_cache.staged import StagedPrefix as StagedPrefix
from shared_cache.tiers import CLOSE_TIMEOUT_S


class PrefixCache(Protocol):
    """The cache of one engine, in one shard or several. Thread-safe.

    Methods marked *in the step* never wait. Counts of blocks are counts of whole ones: all shards
    of a block together are one.
    """

    @property
    def deadline_s(self) -> float:
        """Longest time a request waits for blocks from the tiers, where nobody says otherwise."""

    @property
    def is_flush_hopeless(self) -> bool:
        """Whether the last flush ran out of time: another one would too."""

    @property
    def turn_budget(self) -> TurnBudget:
        """How many blocks may be copied off the device in a turn."""

    @property
    def num_reserved_ahead(self) -> int | None:
        """Blocks that could be saved now without being dropped; None: no limit; *in the step*."""

    def reserve_more_ahead(self) -> None:
        """More than that are waiting to be saved; *in the step*."""

    @property
    def num_blocks(self) -> int:
        """Blocks that host memory could hold, were it all this engine's."""

    def lease(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        """Lease what host memory holds of `hashes` from block `first` on; asks no store."""

    def lease_held(
        self, hashes: Sequence[BlockHash], first: int = 0, scope: ReuseScope = DEFAULT_SCOPE
    ) -> StagedPrefix:
        """Lease once more what this process has leased now, from `first` on; *in the step*."""

    def lease_coming(
        self, hashes: Sequence[BlockHash], first: int, enough: int, scope: ReuseScope, wait_s: float
    ) -> StagedPrefix:
        """Lease once more what has come of `hashes[first:]`, by a `grow`, with block `enough - 1`.

        Waits for `wait_s` seconds at most. Asks no tier: what nobody fetches is not waited for.
        Counts nothing: that `grow` does.
        """

    def can_fetch(self, hashes: Sequence[BlockHash], start: int) -> bool:
        """Whether blocks from `start` on could come from a tier now; without asking any."""

    def grow(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], deadline_s: float | None = None
    ) -> StagedPrefix:
        """Fetch what `staged` lacks of `hashes` and is worth it; takes over `staged`."""

    def places(self, staged: StagedPrefix) -> tuple[Place, ...]:
        """Where the staged blocks lie, shard by shard, first block first; *in the step*."""

    def release(self, staged: StagedPrefix) -> None:
        """End a lease; a second release is a no-op; *in the step*."""

    def miss_deadline(self) -> None:
        """Count a request whose time ran out, perhaps before it was its turn to `grow`."""

    def lose(self, num_blocks: int) -> None:
        """Count blocks that could not be saved; *in the step*."""

    def flush(self, timeout_s: float) -> bool:
        """Wait until every save is published and written; False when time ran out."""

    def stats(self) -> CacheStats:
        """A snapshot; may ask the owner of the node's memory."""

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop threads, close tiers and host tier; queued saves are dropped: `flush` first."""
