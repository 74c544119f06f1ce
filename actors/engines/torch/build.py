"""From a replica's settings to a running embedded engine."""

import torch

from actors.config import EngineConfig, ModelSource, ReplicaConfig
from actors.engines.torch.compute import ComputeThread
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.engine import TorchEngine
from actors.engines.torch.model import LoadedModel, block_layout, load_model
from actors.engines.torch.pool import PagedPool, allocate_pool
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.errors import ConfigError
from shared_cache.namespace import Namespace
from shared_cache.opening import open_cache
from shared_cache.staging import SharedCache

_LOAD_AHEAD_BYTES = 32 << 20
"""A load of more than that takes a good part of a decoding turn, and others would wait for it."""


def build_torch_engine(config: ReplicaConfig) -> TorchEngine:
    """The engine, warmed up, with its part in the cache opened.

    Raises `ConfigError` or `ModelError`; nothing stays open then.
    """
    cache_config = _cache_config(config)
    _check(config.engine, cache_config)
    thread = ComputeThread(config.engine.torch_threads)
    try:
        return _build(config, cache_config, thread)
    except BaseException:
        thread.stop()
        raise


def _build(
    config: ReplicaConfig, cache_config: CacheConfig | None, thread: ComputeThread
) -> TorchEngine:
    engine, source = config.engine, config.model
    if engine.is_cuda:  # streams and graphs belong to a thread's current device
        index = torch.device(engine.device).index or 0
        thread.call(lambda: torch.cuda.set_device(index))
    model, pool = thread.call(lambda: _load(source, engine))
    namespace = Namespace(source.name, source.revision, "torch", pool.layout)
    if cache_config is None:
        return TorchEngine(thread, model, pool, namespace, engine)
    cache = open_cache(cache_config, namespace)
    try:
        connector = _connector(cache, pool)
        return TorchEngine(thread, model, pool, namespace, engine, connector)
    except BaseException:
        cache.close()
        raise


def _load(source: ModelSource, engine: EngineConfig) -> tuple[LoadedModel, PagedPool]:
    kv = engine.kv_cache_config
    is_dummy = engine.load_format == "dummy"
    model = load_model(
        source, engine.torch_dtype, engine.device, engine.max_seq_len, is_dummy=is_dummy
    )
    layout = block_layout(model.config, kv.tokens_per_block, engine.torch_dtype)
    return model, allocate_pool(layout, kv.pool_tokens // kv.tokens_per_block, engine.device)


def _connector(cache: SharedCache, pool: PagedPool) -> ConnectorDriver:
    worker = SharedCacheWorker(cache, is_told_of_writes=True)
    worker.register_kv_caches(pool.tensor)
    scheduler = SharedCacheScheduler(
        cache,
        pool.layout.tokens_per_block,
        holds_unsaved=True,
        ahead_from_blocks=_LOAD_AHEAD_BYTES // pool.layout.block_bytes
        if pool.tensor.is_cuda
        else None,
    )
    return ConnectorDriver(scheduler, worker, cache)


def _cache_config(config: ReplicaConfig) -> CacheConfig | None:
    """The cache section, or a host tier of this engine alone, or nothing."""
    engine, kv = config.engine, config.engine.kv_cache_config
    if config.cache is None and kv.host_cache_size:
        return CacheConfig(host=HostConfig(scope="process", bytes=kv.host_cache_size))
    if config.cache is None:
        return None
    # What every request of a turn fills: its share of the turn's tokens, and a block begun before.
    blocks_per_turn = engine.max_num_tokens // kv.tokens_per_block + engine.max_batch_size
    return config.cache.with_reserve_ahead(2 * blocks_per_turn)


def _check(engine: EngineConfig, cache: CacheConfig | None) -> None:
    kv = engine.kv_cache_config
    if kv.pool_tokens < kv.tokens_per_block:
        raise ConfigError(
            f"kv_cache_config.max_tokens ({kv.pool_tokens}) is below tokens_per_block "
            f"({kv.tokens_per_block}): the pool would hold no block; raise it"
        )
    if cache is not None and not kv.enable_block_reuse:
        raise ConfigError(
            "kv_cache_config.enable_block_reuse is off, so nothing would ever be loaded from the "
            "cache; switch it on, or remove cache and host_cache_size"
        )
    try:
        torch.empty(0, device=engine.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"engine.device {engine.device!r} cannot be used here: {error}; use cpu"
        ) from error
