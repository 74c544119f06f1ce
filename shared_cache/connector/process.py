"""One cache for one process, whoever of the connector asks for it first.

TensorRT-LLM constructs scheduler and worker at the same time in two threads, hands neither to the
other, and has no call that ends them. Both must have the same cache: two would lease and save
apart. So it is opened here, under a lock, kept for whoever asks for the same one, and ended by the
last one that leaves, or by the end of the process.
"""

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from shared_cache.config import CacheConfig
from shared_cache.connector.match_log import MatchLog
from shared_cache.connector.model_files import read_model
from shared_cache.connector.scheduler import MatchRule
from shared_cache.connector.stats_log import StatsLog
from shared_cache.connector.trtllm_config import ConnectorConfig, read_connector_config
from shared_cache.connector.trtllm_facts import EngineFacts, Runtime, check_engine, facts_of
from shared_cache.errors import ConfigError
from shared_cache.host.sizing import sized_for_this_machine
from shared_cache.opening import open_cache
from shared_cache.prefix_cache import PrefixCache
from shared_cache.sharded import ShardedCache, shard_config
from shared_cache.staging import SharedCache

logger = logging.getLogger(__name__)

FLUSH_AT_EXIT_S = 10.0
"""How long the end of a process waits for saves that are under way."""

SPARE_SLOTS = 64
"""Slots reserved beyond what two turns of prefill fill: for blocks that decodes complete."""


@dataclass(frozen=True, slots=True)
class Joined:
    """What one side of the connector works with.

    `cache` is the whole cache on rank 0, which looks up prompts for all ranks, and `shard`
    elsewhere; `shard` is this rank's part of it, which the worker copies from and saves to.
    `matches` holds the answers of this process's scheduler side.
    """

    cache: PrefixCache
    shard: SharedCache
    facts: EngineFacts
    rule: MatchRule
    key: tuple[str, ...]
    matches: MatchLog = field(default_factory=MatchLog)
    _closers: "list[weakref.WeakMethod[Callable[[], None]]]" = field(default_factory=list)

    def on_close(self, close: Callable[[], None]) -> None:
        """Have the method `close` called before the cache closes, unless its object is gone then.

        Saves that are under way are waited for before that.
        """
        self._closers.append(weakref.WeakMethod(close))

    def close_users(self) -> None:
        """Call what was given to `on_close`; what one raises is logged, and the next one called."""
        while self._closers:
            close = self._closers.pop()()
            if close is None:
                continue
            try:
                close()
            except Exception:  # the cache must be closed whatever becomes of a device
                logger.exception("a part of the connector did not close")


class _Opened:
    """A cache that is open, and how many hold it."""

    def __init__(self, joined: Joined, stats_period_s: float) -> None:
        self.joined = joined
        self.num_holders = 0
        is_leader = joined.facts.tp_rank == 0
        what = f"shared cache {joined.facts.namespace.fingerprint[:12]}"
        self._log = StatsLog(what, joined.cache.stats, stats_period_s if is_leader else 0.0)

    def close(self, flush_s: float) -> None:
        """Wait for saves as long as that helps, have users let go of their pools, and close."""
        cache = self.joined.cache
        if not cache.is_flush_hopeless and not cache.flush(flush_s):
            logger.warning("not all saves were written within %g s; the rest is dropped", flush_s)
        self.joined.close_users()
        self._log.close()
        cache.close()


_lock = threading.Lock()
_opened: dict[tuple[str, ...], _Opened] = {}
"""By configuration, namespace and rank; whoever joined last stands last."""


def join(llm_args: Any, runtime: Runtime) -> Joined:
    """This process's part in the cache that the YAML file describes, opened if it is not yet.

    Raises `ConfigError` or `ModelError` with the fix in the text when the engine's settings, the
    file, the model or the cache do not allow it. Every call is to be followed by one of `leave`,
    or by the end of the process.
    """
    path, config = read_connector_config(runtime.environment)
    _show_log(config.log_level)
    check_engine(llm_args, config, runtime)
    with _lock:
        files, revision = read_model(llm_args, config)
        facts = facts_of(llm_args, files, revision, config, runtime)
        key = (config.model_dump_json(), facts.namespace.fingerprint, str(facts.tp_rank))
        opened = _opened.pop(key, None)
        if opened is None:
            opened = _Opened(_open(path, config, facts, key), config.stats_period_s)
            _flush_at_exit()
            _tell(path, config, facts)
        opened.num_holders += 1
        _opened[key] = opened
        return opened.joined


def leave(joined: Joined, flush_s: float = FLUSH_AT_EXIT_S) -> None:
    """End one `join`; the last one flushes and closes the cache. Nothing may use it any more.

    Nothing is left to do after `leave_current`.
    """
    with _lock:
        opened = _opened.get(joined.key)
        if opened is None or opened.joined is not joined:
            return
        opened.num_holders -= 1
        if opened.num_holders:
            return
        del _opened[joined.key]
    opened.close(flush_s)


def current_cache() -> PrefixCache | None:
    """The cache that a connector in this process joined last; None when there is none."""
    with _lock:
        return _opened[next(reversed(_opened))].joined.cache if _opened else None


def leave_current(flush_s: float = FLUSH_AT_EXIT_S) -> None:
    """End every `join` of `current_cache`: for who has ended the engine whose connector it was."""
    with _lock:
        opened = _opened.popitem()[1] if _opened else None
    if opened is not None:
        opened.close(flush_s)


def open_shards(
    config: CacheConfig, facts: EngineFacts, ranks: Sequence[int], saving_rank: int | None
) -> list[SharedCache]:
    """The caches of these ranks' shards, for this process. Raises `ConfigError`; none is open then.

    Only `saving_rank` (None: none) keeps slots reserved for new blocks; of the others this process
    brings blocks in, and their own ranks save.
    """
    size = facts.layout.tokens_per_block
    turns = 2 * (facts.max_num_tokens // size) + SPARE_SLOTS
    config = shard_config(config, len(ranks))
    host = config.host.model_copy(update={"reserve_ahead": 1})
    only_read = config.model_copy(update={"host": host})
    with ExitStack() as opened:
        shards = []
        for rank in ranks:
            shard = config.with_reserve_ahead(turns) if rank == saving_rank else only_read
            shards.append(open_cache(shard, facts.namespace_of(rank)))
            opened.callback(shards[-1].close)
        opened.pop_all()
        return shards


def whole_cache(shards: Sequence[SharedCache]) -> PrefixCache:
    """One cache over the shards of all ranks."""
    return shards[0] if len(shards) == 1 else ShardedCache(shards)


def sized(config: ConnectorConfig) -> ConnectorConfig:
    """`config` with sizes that fit this machine where it names none.

    A quarter of host memory may wait to be written: a long prompt's blocks come all at once, and
    they wait in the slots that they have anyway.
    """
    host = sized_for_this_machine(config.host)
    changed: dict[str, Any] = {"host": host}
    if "save_queue_bytes" not in config.model_fields_set:
        changed["save_queue_bytes"] = ByteSize(host.bytes // 4)
    return config.model_copy(update=changed)


def _open(path: Path, config: ConnectorConfig, facts: EngineFacts, key: tuple[str, ...]) -> Joined:
    ranks = range(facts.tp_size) if facts.tp_rank == 0 else (facts.tp_rank,)
    try:
        shards = open_shards(sized(config), facts, ranks, facts.tp_rank)
    except ConfigError as error:
        raise ConfigError(f"{path} (where `cache.` is left out): {error}") from error
    rule = MatchRule(staged_ahead=config.staged_ahead, wait_s=config.match_wait_s)
    return Joined(whole_cache(shards), shards[0], facts, rule, key)


def _tell(path: Path, config: ConnectorConfig, facts: EngineFacts) -> None:
    for warning in facts.warnings:
        logger.warning("%s", warning)
    name, layout = facts.namespace, facts.layout
    logger.info(
        "shared cache of rank %d of %d (%s): namespace %s, %s %s, %s, %d tokens per block, %s, "
        "%.2f MiB a block; tiers: %s",
        facts.tp_rank,
        facts.tp_size,
        path,
        facts.namespace_of(facts.tp_rank).fingerprint[:12],
        name.model,
        name.revision[:12],
        name.engine,
        layout.tokens_per_block,
        layout.dtype,
        layout.block_bytes / (1 << 20),
        ", ".join(tier.url for tier in config.all_tiers) or "none",
    )


def _show_log(level: str) -> None:
    """Have our lines shown on stderr, where nobody has said what becomes of them."""
    ours = logging.getLogger("shared_cache")
    if ours.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] [kvcommons] [%(levelname)s] %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(level.upper())


def _flush_at_exit() -> None:
    """Have saves flushed when the process ends, before caches close by themselves."""
    atexit.unregister(_close_all)
    atexit.register(_close_all)  # what is registered last is called first


def _close_all() -> None:
    with _lock:
        remaining = list(_opened.values())
        _opened.clear()
    for opened in remaining:
        opened.close(FLUSH_AT_EXIT_S)
