"""What a snapshot of a replica or the router says, in the words of the metric table. Pure.

A counter that first appears when something fails has no rate at that moment, so a rare fault would
show as nothing at all. So every combination of tags is told from the beginning, with its zero.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

from actors.canary import CanaryReport
from actors.engine import EngineStats
from actors.replica_health import ReplicaStats
from actors.router_snapshot import RouterSnapshot
from shared_cache.cache_stats import CacheStats
from shared_cache.cost import GateStats
from shared_cache.tiers import TierStats


@dataclass(frozen=True, slots=True)
class Figure:
    """The value of one time series: of a counter all that was counted so far."""

    name: str
    value: float
    tags: tuple[tuple[str, str], ...] = ()


def figure(name: str, value: float, **tags: str) -> Figure:
    """A figure with these tags."""
    return Figure(name, value, tuple(tags.items()))


def replica_figures(replica: str, stats: ReplicaStats | None) -> Iterator[Figure]:
    """All figures of one replica; None: it does not answer, and only that is told."""
    is_up = stats is not None and stats.health.state == "ready"
    yield figure("replica_up", is_up, replica=replica)
    if stats is None:
        return
    if stats.engine is not None:
        yield from _engine_figures(replica, stats.engine, stats.num_outstanding)
    if stats.cache is not None:
        yield from _cache_figures(replica, stats.cache)


def router_figures(snapshot: RouterSnapshot) -> Iterator[Figure]:
    """What the router has done."""
    for one in snapshot.replicas:
        name, accuracy = one.replica_id, one.accuracy
        yield figure("routed_requests", one.num_routed, replica=name)
        yield figure("router_missing_ratio", accuracy.missing, replica=name)
        yield figure("router_load_only", accuracy.is_load_only, replica=name)
        yield figure("router_demotions", accuracy.num_demotions, replica=name)
        if accuracy.num_predictions:
            off = {"error": accuracy.ttft_error_s, "bias": accuracy.ttft_bias_s}
            for kind, seconds in off.items():
                yield figure("router_ttft_seconds", seconds, replica=name, kind=kind)
    yield figure("router_index_blocks", snapshot.index_blocks)
    yield figure("router_gaps", snapshot.num_gaps)
    yield figure("router_cached_tokens", snapshot.predicted_cached_tokens, kind="predicted")
    yield figure("router_cached_tokens", snapshot.actual_cached_tokens, kind="actual")


def canary_figures(report: CanaryReport, now_s: float) -> Iterator[Figure]:
    """What the last round of canaries showed; `now_s` is seconds since the epoch."""
    pairs = [one.finding for one in report.pairs]
    for name, findings in (("canary_pairs", pairs), ("canary_stores", report.stores)):
        failed = sum(one.state == "fail" for one in findings)
        yield figure(name, failed, state="failed")
        yield figure(name, len(findings) - failed, state="ok")
    yield figure("canary_seconds", report.seconds)
    yield figure("canary_age_seconds", max(0.0, now_s - report.ended_s))


def tier_name(url: str) -> str:
    """A tier's URL as a tag: without a password that may be in it."""
    return re.sub(r"//[^/@]*@", "//", url)


def _engine_figures(replica: str, engine: EngineStats, num_outstanding: int) -> Iterator[Figure]:
    staging = max(0, num_outstanding - engine.num_waiting - engine.num_running)
    states = {"staging": staging, "waiting": engine.num_waiting, "running": engine.num_running}
    for state, number in states.items():
        yield figure("queued_requests", number, replica=replica, state=state)
    blocks = engine.kv_cache
    yield figure("device_blocks", blocks.used_num_blocks, replica=replica, state="used")
    yield figure("device_blocks", blocks.free_num_blocks, replica=replica, state="free")


def _cache_figures(replica: str, cache: CacheStats) -> Iterator[Figure]:
    host = cache.host
    slots = {"used": host.used_slots, "free": host.free_slots, "reserved": host.reserved_slots}
    for state, number in slots.items():
        yield figure("host_blocks", number, replica=replica, state=state)
    yield figure("leased_blocks", host.leased_slots, replica=replica)
    yield figure("evicted_blocks", host.evicted_blocks, replica=replica)
    yield figure("saved_blocks", cache.saved_blocks, replica=replica)
    yield figure("dropped_save_blocks", cache.dropped_saves, replica=replica)
    yield figure("pending_save_blocks", cache.pending_saves, replica=replica)
    yield figure("deadline_misses", cache.deadline_misses, replica=replica)
    for tier in cache.tiers:
        yield from _tier_figures(replica, tier)
    if cache.gate is not None:
        yield from _gate_figures(replica, cache.gate)


def _tier_figures(replica: str, stats: TierStats) -> Iterator[Figure]:
    tier = tier_name(stats.url)
    moved = {
        "read": (stats.read_bytes, stats.read_s),
        "written": (stats.written_bytes, stats.write_s),
    }
    for direction, (num_bytes, busy_s) in moved.items():
        tags = {"replica": replica, "tier": tier, "direction": direction}
        yield figure("tier_bytes", num_bytes, **tags)
        yield figure("tier_busy_seconds", busy_s, **tags)
    faults = {
        "error": stats.faults,
        "corrupt": stats.corrupt_objects,
        "foreign": stats.foreign_objects,
        "vanished": stats.vanished_objects,
        "retry": stats.retries,
    }
    for kind, number in faults.items():
        yield figure("faults", number, replica=replica, tier=tier, kind=kind)


def _gate_figures(replica: str, gate: GateStats) -> Iterator[Figure]:
    decisions = {
        "load": gate.loads,
        "split": gate.splits,
        "compute": gate.computes,
        "untested": gate.untested,
        "probe": gate.probes,
    }
    for decision, number in decisions.items():
        yield figure("gate_decisions", number, replica=replica, decision=decision)
    for what, error in (("fetch", gate.fetch_error), ("prefill", gate.prefill_error)):
        if error is not None:
            yield figure("gate_error_ratio", error, replica=replica, what=what)
    for url, speed in gate.tiers.items():
        if isfinite(speed.bytes_per_s):  # else: nothing was read yet
            tags = {"replica": replica, "tier": tier_name(url)}
            yield figure("tier_bytes_per_second", speed.bytes_per_s, **tags)
