"""`kvcommons cache warm`: bring what a store was last asked for into this node's arena.

For a node that was just started: without it the first requests all wait for the store. It takes
part in the arena as a replica does, so running replicas find the blocks at once. It uses free
memory only, and what it pins stays for as long as it was told, after its own end too.
"""

import argparse
from contextlib import closing
from dataclasses import asdict, dataclass

from pydantic import ValidationError

from cluster.cache_target import add_target, cache_config, progress, readable, show, whole_store
from cluster.units import parse_bytes, parse_duration_s, show_bytes
from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError
from shared_cache.hashing import BlockHash
from shared_cache.host.folder import is_locked, open_folder
from shared_cache.host.interface import HostTier
from shared_cache.host.node import open_node_tier
from shared_cache.namespace import Namespace
from shared_cache.stores.store import BlockStore
from shared_cache.upkeep.warming import hottest_prefixes, warm_prefix


@dataclass(frozen=True, slots=True)
class Warmed:
    """What is in the arena now of what was wanted there."""

    num_prefixes: int
    num_blocks: int
    num_bytes: int
    num_wanted_blocks: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cache warm`."""
    add_target(parser)
    parser.add_argument("--arena", metavar="NAME", help="arena to fill, if not that of --config")
    parser.add_argument(
        "--max-bytes", metavar="SIZE", help="most memory to fill (all that is free)"
    )
    parser.add_argument("--pin", metavar="TIME", help="keep the blocks there so long: 1h")
    parser.add_argument("--json", dest="as_json", action="store_true", help="for programs")


def warm(arguments: argparse.Namespace) -> int:
    """Fill the arena, print how much; exit status 0."""
    pin_s = parse_duration_s(arguments.pin) if arguments.pin else 0.0
    max_bytes = parse_bytes(arguments.max_bytes) if arguments.max_bytes else None
    whole, arena = whole_store(arguments), _running_arena(arguments)
    namespaces = [namespace for _, namespace in readable(whole, arguments.namespace)]
    if len(namespaces) > 1:
        raise ConfigError(
            f"{whole.url} holds {len(namespaces)} namespaces: choose one of `cache ls` with "
            "--namespace"
        )
    for namespace in namespaces:
        with (
            closing(_join(arena, namespace)) as host,
            closing(whole.open(namespace)) as store,
        ):
            warmed = fill(
                host, store, namespace, max_bytes, pin_s, is_shared=_is_shared_tier(arguments)
            )
        pinned = f", pinned for {arguments.pin}" if pin_s else ""
        text = (
            f"{warmed.num_blocks} blocks ({show_bytes(warmed.num_bytes)}) of {warmed.num_prefixes} "
            f"prefixes are in the arena {arena.name}{pinned}"
        )
        show(asdict(warmed) if arguments.as_json else None, None, text)
    return 0


def fill(
    host: HostTier,
    store: BlockStore,
    namespace: Namespace,
    max_bytes: int | None,
    pin_s: float,
    *,
    is_shared: bool,
) -> Warmed:
    """Bring the hottest prefixes of `store` into the free memory of `host`.

    `is_shared`: see `warm_prefix`.
    """
    block_bytes = namespace.layout.block_bytes
    room_blocks = host.stats().free_slots
    if max_bytes is not None:
        room_blocks = min(room_blocks, max_bytes // block_bytes)
    prefixes = list(hottest_prefixes(store.entries(), room_blocks))
    wanted = {block_hash for prefix in prefixes for block_hash in prefix.hashes}
    warmed: set[BlockHash] = set()
    num_prefixes = 0
    with progress("warming", len(wanted)) as advance:
        for prefix in prefixes:
            here = prefix.hashes[: warm_prefix(host, store, prefix, pin_s, is_shared=is_shared)]
            num_prefixes += bool(here)
            advance(len(set(here) - warmed))
            warmed.update(here)
    return Warmed(num_prefixes, len(warmed), len(warmed) * block_bytes, len(wanted))


def _is_shared_tier(arguments: argparse.Namespace) -> bool:
    """Whether the store is known to be the one that the arena's replicas share.

    An arena does not say which that is; its cluster's configuration does.
    """
    return arguments.config is not None and not arguments.options and not arguments.arena


def _running_arena(arguments: argparse.Namespace) -> HostConfig:
    """The arena to fill, which must have an owner: one started here would end with nobody in it."""
    host = HostConfig() if arguments.config is None else cache_config(arguments.config).host
    if host.scope != "node":
        raise ConfigError("cache.host.scope is process: there is no arena that replicas share")
    changes = {"start_owner": False} | ({"name": arguments.arena} if arguments.arena else {})
    try:
        host = HostConfig.model_validate(host.model_dump() | changes)
    except ValidationError as error:
        raise ConfigError(f"--arena {arguments.arena!r} is no name of an arena") from error
    if not is_locked(open_folder(host).lock):
        raise ConfigError(
            f"no arena {host.name!r} runs on this machine: start the replicas first, or name the "
            "one to fill with --arena or --config"
        )
    return host


def _join(arena: HostConfig, namespace: Namespace) -> HostTier:
    return open_node_tier(arena, namespace.fingerprint, namespace.layout.block_bytes)
