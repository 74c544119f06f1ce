"""Opening a cache from its settings: what is wrong is said at start, with the fix in the text."""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from shared_cache.config import CacheConfig, TierConfig
from shared_cache.errors import ConfigError, StoreError
from shared_cache.host.interface import HostTier
from shared_cache.host.terms import StoreAdmission
from shared_cache.namespace import Namespace
from shared_cache.staging import SharedCache
from shared_cache.stores.store import BlockStore

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_cache(config: CacheConfig, namespace: Namespace) -> SharedCache:
    """The cache that `config` describes, for one replica.

    Raises `ConfigError` when a tier's URL or options are wrong, it cannot be reached or is not a
    place to write to, or the host tier cannot be had (the text says how to mend it). A tier that
    may only be read is used for reading, with a warning.
    """
    with ExitStack() as opened:
        stores = []
        for index, tier in enumerate(config.all_tiers):
            stores.append(_open_tier(config, index, tier, namespace))
            opened.callback(stores[-1].close)
        is_read_only = bool(stores) and stores[-1].read_only
        admission = config.store_admission(is_read_only=is_read_only)
        host = _open_host(config, namespace, admission)
        opened.callback(host.close)
        cache = SharedCache(host, stores, config)
        opened.pop_all()
        return cache


def _open_tier(
    config: CacheConfig, index: int, tier: TierConfig, namespace: Namespace
) -> BlockStore:
    # Imported here so that a cache without tiers does not load fsspec.
    from shared_cache.media.spares import spare_bytes_of
    from shared_cache.stores.fs_store import open_store

    name = "cache.store" if config.store is not None else f"cache.tiers[{index}].url"
    without = "set cache.store to null" if config.store is not None else "remove this tier"
    try:
        store = _within(
            tier.timeout_s,
            lambda: open_store(
                tier.url,
                namespace,
                tier.options,
                codec=tier.codec,
                spare_bytes=spare_bytes_of(tier.max_bytes),
                timeout_s=tier.timeout_s,
            ),
        )
    except TimeoutError as error:
        raise ConfigError(
            f"{name} {tier.url} did not answer within {tier.timeout_s:g} s; check the address and "
            f"the network, raise timeout_s of the tier, or {without}"
        ) from error
    except StoreError as error:
        raise ConfigError(
            f"{name} {tier.url} cannot be used: {error}; mend it, or {without} to do without"
        ) from error
    store.refresh_in_background()
    if store.read_only:
        logger.warning("%s %s may only be read: no new blocks are written there", name, tier.url)
    return store


def _open_host(config: CacheConfig, namespace: Namespace, admission: StoreAdmission) -> HostTier:
    # Imported here: who shares no memory needs nothing that is there for sharing it.
    if config.host.scope == "node":
        from shared_cache.host.node import open_node_tier

        block_bytes = namespace.layout.block_bytes
        return open_node_tier(config.host, namespace.fingerprint, block_bytes, admission)
    from shared_cache.host.local import LocalHostTier
    from shared_cache.host.owner import rules_of

    rules = rules_of(config.host, admission)
    return LocalHostTier(config.host.bytes, namespace.layout.block_bytes, rules)


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """The result of `call`; `TimeoutError` when it takes longer, and it is left behind."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="kvcommons-open", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    if errors:
        raise errors[0]
    return results[0]
