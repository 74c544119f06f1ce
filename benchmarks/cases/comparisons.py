"""Which methods are compared with each other, and which ratios come out."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.cases.arena import (
    RESERVE_AHEAD,
    Arena,
    commit_in_background,
    host_config,
    namespace,
    opened,
    owned,
    shared_folder,
)
from benchmarks.cases.disk import (
    ColdStore,
    DirectFile,
    Store,
    has_direct_io,
    store_in,
    warm_memory,
)
from benchmarks.cases.others import Lmcache, S3fs, TorchSave
from benchmarks.cases.rounds import Comparison, Memcpy, Method, Payload, compare
from benchmarks.rivals.environment import RivalError
from benchmarks.rivals.lmcache import LmcacheRival
from benchmarks.rivals.s3_server import running_s3_server
from benchmarks.rivals.workload import PREFIX_BLOCKS
from shared_cache.stores.fs_store import open_store

ARENA_SHARE = 2.5
"""The arena's size, in payloads: what was put is still there when it is got."""

WAITING = "arena, waiting for each commit"

S3FS_AT_ONCE = (8, 32)
"""Requests of s3fs in flight; compared with the better one."""

Ratios = dict[str, float | None]


@dataclass(frozen=True)
class Setting:
    """What all comparisons of one run have in common; `folder` is on the disk to measure."""

    folder: Path
    num_rounds: int
    with_rivals: bool = True


@dataclass
class Found:
    """The outcome of one comparison."""

    ratios: Ratios
    gb_per_s: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)


def compare_host(stack: ExitStack, size: str, num_blocks: int, setting: Setting) -> Found:
    """The arena against memcpy and LMCache's memory back end."""
    space, notes = namespace(size), list[str]()
    payload = Payload(space.layout.block_bytes, num_blocks)
    arenas = stack.enter_context(shared_folder())
    num_slots = max(int(ARENA_SHARE * num_blocks), 8 * RESERVE_AHEAD)
    num_bytes = num_slots * payload.block_bytes
    methods: list[Method] = [Memcpy(payload)]
    for name, verify in (("arena", False), ("arena, every get verified", True)):
        config = host_config(arenas, num_bytes, verify=verify)
        stack.enter_context(owned(config))
        cache = stack.enter_context(opened(config, space))
        # As a replica saves: the blocks of one turn are committed while the next are copied; the
        # clock stops when all are committed.
        methods.append(Arena(name, cache, payload, commit_in_background))
        if not verify:
            methods.append(Arena(WAITING, cache, payload))
    rival = _lmcache(stack, setting.folder / f"host-{size}", payload, setting, notes)
    if rival is not None:
        methods.append(Lmcache(rival, "local_cpu"))
    done = compare(methods, payload.num_bytes, setting.num_rounds)
    ratios: Ratios = {
        "get_vs_memcpy": done.get_ratio("arena", "memcpy"),
        "put_vs_memcpy": done.put_ratio("arena", "memcpy"),
        "get_vs_lmcache_local_cpu": done.get_ratio("arena", "LMCache local_cpu"),
        "put_vs_lmcache_local_cpu": done.put_ratio("arena", "LMCache local_cpu"),
        "waiting_put_vs_memcpy": done.put_ratio(WAITING, "memcpy"),
        "waiting_put_vs_lmcache_local_cpu": done.put_ratio(WAITING, "LMCache local_cpu"),
        "verified_get_vs_memcpy": done.get_ratio("arena, every get verified", "memcpy"),
    }
    return Found(ratios, done.gb_per_s(), notes)


def compare_disk(stack: ExitStack, size: str, num_blocks: int, setting: Setting) -> Found:
    """The local store against torch.save, LMCache's file back ends, and the disk itself."""
    space, notes = namespace(size), list[str]()
    payload = Payload(space.layout.block_bytes, num_blocks)
    place = setting.folder / f"disk-{size}"
    place.mkdir()
    full = Store("store", store_in(place / "full", space, 2 * payload.num_bytes), payload)
    fresh = Store("store, fresh files", store_in(place / "fresh", space), payload)
    methods: list[Method] = [TorchSave(place / "torch", payload), full, fresh]
    for store in (full, fresh):
        stack.callback(store.close)
    rival = _lmcache(stack, place / "lmcache", payload, setting, notes)
    if rival is not None:
        methods += [Lmcache(rival, "local_disk"), Lmcache(rival, "fs")]
    done = compare(
        methods,
        payload.num_bytes,
        setting.num_rounds,
        lambda: warm_memory(place, payload.num_bytes),
    )
    cold = _compare_cold(stack, size, payload, setting.num_rounds, place)
    notes.append("disk put: the store is at its byte budget and writes over deleted objects")
    if cold is None:
        notes.append("the folder has no direct I/O: nothing to compare a cold read with")
    return Found(_disk_ratios(done, cold), done.gb_per_s() | _speeds(cold), notes)


def _disk_ratios(done: Comparison, cold: Comparison | None) -> Ratios:
    lmcache = ("LMCache local_disk", "LMCache fs")
    puts = [done.put_ratio("store", name) for name in lmcache]
    gets = [done.get_ratio("store", name) for name in lmcache]
    return {
        "put_vs_torch_save": done.put_ratio("store", "torch.save"),
        "get_vs_torch_save": done.get_ratio("store", "torch.save"),
        "put_vs_lmcache_disk": _least(puts),
        "get_vs_lmcache_disk": _least(gets),
        "cold_get_vs_o_direct": cold.get_ratio("cold store", "o_direct") if cold else None,
        "put_fresh_vs_torch_save": done.put_ratio("store, fresh files", "torch.save"),
        "put_vs_lmcache_local_disk": puts[0],
        "get_vs_lmcache_local_disk": gets[0],
        "put_vs_lmcache_fs": puts[1],
        "get_vs_lmcache_fs": gets[1],
    }


def _compare_cold(
    stack: ExitStack, size: str, payload: Payload, num_rounds: int, place: Path
) -> Comparison | None:
    if not has_direct_io(place):
        return None
    opened_store = store_in(place / "cold", namespace(size))
    cold = ColdStore("cold store", opened_store, payload, place / "cold")
    stack.callback(cold.close)
    return compare([cold, DirectFile(place, payload)], payload.num_bytes, num_rounds)


def compare_s3(stack: ExitStack, size: str, num_blocks: int, setting: Setting) -> Found:
    """The store on S3 against s3fs with one object for each block, on a server of this machine."""
    space = namespace(size)
    payload = Payload(space.layout.block_bytes, num_blocks)
    server = stack.enter_context(running_s3_server())
    open_s3 = partial(open_store, f"s3://{server.bucket}/store", space, server.options)
    # The server does not list, and a prefix is read by one call, which has its own concurrency.
    store = Store("store", open_s3, payload, piece_blocks=PREFIX_BLOCKS, deletes=False)
    stack.callback(store.close)
    rivals = [S3fs(server, payload, at_once) for at_once in S3FS_AT_ONCE]
    done = compare([store, *rivals], payload.num_bytes, setting.num_rounds)
    ratios: Ratios = {
        "get_vs_s3fs": _least([done.get_ratio("store", rival.name) for rival in rivals]),
        "put_vs_s3fs": _least([done.put_ratio("store", rival.name) for rival in rivals]),
    }
    return Found(ratios, done.gb_per_s(), [f"S3: {server.kind} on loopback, no latency"])


def _lmcache(
    stack: ExitStack, folder: Path, payload: Payload, setting: Setting, notes: list[str]
) -> LmcacheRival | None:
    """LMCache with the same bytes; None, with a note, where it cannot be installed."""
    if not setting.with_rivals:
        return None
    folder.mkdir(parents=True)
    try:
        return stack.enter_context(
            LmcacheRival(folder, payload.block_bytes, payload.num_blocks, payload.seed)
        )
    except RivalError as error:
        notes.append(f"without LMCache: {error}")
        return None


def _least(ratios: list[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return min(known, default=None)


def _speeds(done: Comparison | None) -> dict[str, dict[str, float]]:
    return done.gb_per_s() if done else {}
