"""What `kvcommons status` says: a table for people, plain data for programs.

A cache that fails only makes answers slower, so nobody complains. Dropped saves and faults of the
store are therefore shown beside the hit rate, and the engine's counters carry TensorRT-LLM's names,
so that what watches one engine can watch the other.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from actors.replica_health import ReplicaStats
from actors.router_snapshot import RouterSnapshot

AWAY = "away"
"""The state of a replica that does not answer."""

BY_LOAD = ",\nby load"
"""After the state of a replica whose cache the router does not believe in for now."""

NONE = "-"

COLUMNS = (
    "replica",
    "state",
    "pid",
    "running",
    "routed",
    "hit\nrate",
    "tokens\nout",
    "dropped\nsaves",
    "store\nfaults",
)


def as_table(snapshot: RouterSnapshot, stats: Mapping[str, ReplicaStats | None]) -> Table:
    """One row for each replica that the router knows."""
    table = Table(box=SIMPLE, show_edge=False, padding=0)  # 80 columns suffice
    for column in COLUMNS:
        table.add_column(column, no_wrap=True)
    for one in snapshot.replicas:
        state, *rest = _row(one.num_routed, stats[one.replica_id])
        if one.accuracy.is_load_only:
            state += BY_LOAD
        table.add_row(one.replica_id, state, *rest)
    return table


def as_data(snapshot: RouterSnapshot, stats: Mapping[str, ReplicaStats | None]) -> dict[str, Any]:
    """All figures as JSON can hold them; those of a replica that does not answer are null."""
    router = asdict(snapshot)
    beliefs = {one["replica_id"]: one for one in router.pop("replicas")}
    replicas = {name: _replica(belief, stats[name]) for name, belief in beliefs.items()}
    return {"router": router, "replicas": replicas}


def _row(num_routed: int, stats: ReplicaStats | None) -> list[str]:
    if stats is None:
        return [AWAY, NONE, NONE, str(num_routed), NONE, NONE, NONE, NONE]
    engine, cache = stats.engine, stats.cache
    return [
        stats.health.state,
        str(stats.health.pid),
        str(stats.num_outstanding),
        str(num_routed),
        f"{engine.kv_cache.cache_hit_rate:.0%}" if engine else NONE,
        str(engine.generated_tokens) if engine else NONE,
        str(cache.dropped_saves) if cache else NONE,
        str(cache.store_faults) if cache else NONE,
    ]


def _replica(belief: dict[str, Any], stats: ReplicaStats | None) -> dict[str, Any]:
    """What the router believes of one replica, and what it says of itself."""
    if stats is None:
        own = {"health": None, "uptime_s": None, "num_outstanding": None, "engine": None}
        return {"state": AWAY, **own, "kvCacheStats": None, "cache": None, "router": belief}
    figures: dict[str, Any] = asdict(stats)
    kv_cache = None
    if stats.engine is not None:
        del figures["engine"]["kv_cache"]
        kv_cache = stats.engine.kv_cache.as_dict()
    return {"state": stats.health.state, **figures, "kvCacheStats": kv_cache, "router": belief}
