"""The counters of one cache from those of its shards. Pure.

Nobody thinks in shards: a block is staged once all ranks have it, and dropped as soon as one lacks
it. Bytes and faults add up, whichever shard they are of.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from shared_cache.cache_stats import CacheStats
from shared_cache.host.interface import HostStats
from shared_cache.tiers import TierStats

_Stats = TypeVar("_Stats", CacheStats, HostStats, TierStats)


def whole_stats(shards: Sequence[CacheStats]) -> CacheStats:
    """The counters in whole blocks, of shards in the order of their ranks.

    What a process fetches counts as far as all shards have it. What it saves may be the shards of
    its own rank alone, so the shard that has most counts.
    """
    least, most, total = _merger(shards, min), _merger(shards, max), _merger(shards, sum)
    return CacheStats(
        host=_host([shard.host for shard in shards]),
        staged_blocks=least("staged_blocks"),
        fetched_blocks=least("fetched_blocks"),
        fetched_bytes=total("fetched_bytes"),
        fetch_s=max(shard.fetch_s for shard in shards),
        deadline_misses=most("deadline_misses"),
        saved_blocks=most("saved_blocks"),
        saved_bytes=total("saved_bytes"),
        dropped_saves=most("dropped_saves"),
        store_faults=total("store_faults"),
        pending_saves=most("pending_saves"),
        peer_blocks=least("peer_blocks"),
        tiers=tuple(_tier(tier) for tier in zip(*(shard.tiers for shard in shards), strict=True)),
        gate=shards[0].gate,
    )


def _host(shards: Sequence[HostStats]) -> HostStats:
    """In whole blocks. The shards have their blocks in one arena, so each sees the same room."""
    least, most, total = _merger(shards, min), _merger(shards, max), _merger(shards, sum)
    free, used, reserved = (
        least("free_slots") // len(shards),
        most("used_slots"),
        most("reserved_slots"),
    )
    return HostStats(
        num_slots=free + used + reserved,
        free_slots=free,
        used_slots=used,
        reserved_slots=reserved,
        leased_slots=most("leased_slots"),
        evicted_blocks=most("evicted_blocks"),
        block_bytes=total("block_bytes"),
        peer_blocks=least("peer_blocks"),
        is_connected=all(shard.is_connected for shard in shards),
    )


def _tier(shards: Sequence[TierStats]) -> TierStats:
    least, most, total = _merger(shards, min), _merger(shards, max), _merger(shards, sum)
    return TierStats(
        url=shards[0].url,
        read_blocks=least("read_blocks"),
        read_bytes=total("read_bytes"),
        read_s=max(shard.read_s for shard in shards),
        written_blocks=most("written_blocks"),
        written_bytes=total("written_bytes"),
        write_s=max(shard.write_s for shard in shards),
        dropped_blocks=most("dropped_blocks"),
        declined_blocks=most("declined_blocks"),
        faults=total("faults"),
        corrupt_objects=total("corrupt_objects"),
        foreign_objects=total("foreign_objects"),
        vanished_objects=total("vanished_objects"),
        retries=total("retries"),
    )


def _merger(shards: Sequence[_Stats], merge: Callable[[list[int]], int]) -> Callable[[str], int]:
    """A function that merges one counter of all shards."""

    def merged(name: str) -> int:
        return merge([getattr(shard, name) for shard in shards])

    return merged
