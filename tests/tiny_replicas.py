"""Real replicas on a tiny model, in this process; they share no memory, so all is stored."""

from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from actors.config import EngineConfig, KvCacheConfig, ModelSource, ReplicaConfig
from actors.engines import build_engine
from actors.questions import AskedReplica
from actors.replica import EngineReplica
from shared_cache.config import CacheConfig
from shared_cache.hashing import ReuseScope

BLOCK = 8


@asynccontextmanager
async def tiny_replica(
    name: str,
    model: ModelSource,
    folder: Path,
    *,
    block: int = BLOCK,
    pool_tokens: int = 512,
    store: str = "store",
    salts: str | None = None,
    cache: dict | None = None,
    revision: str | None = None,
):
    """One replica, ready, as `AskedReplica`; its `replica` is the `EngineReplica`.

    `cache` changes its cache settings (`store: None`: it has no cache), `salts` has it store under
    other salts, `revision` makes its weights others by name.
    """
    settings = {"store": str(folder / store), "host": {"bytes": "4MiB", "scope": "process"}}
    settings |= cache or {}
    if revision is not None:
        model = model.model_copy(update={"revision": revision})
    config = ReplicaConfig(
        name=name,
        model=model,
        engine=EngineConfig(
            torch_threads=1,
            max_num_tokens=64,
            kv_cache_config=KvCacheConfig(tokens_per_block=block, max_tokens=pool_tokens),
        ),
        cache=CacheConfig(**settings) if settings["store"] else None,
    )

    def build(config):
        engine = build_engine(config)
        if salts is not None:
            _use_other_salts(engine, salts)
        return engine

    one = EngineReplica(config, build)
    await one.ready()
    try:
        yield AskedReplica(name, one)
    finally:
        await one.close()


def _use_other_salts(engine, salts: str) -> None:
    """As an engine that is told of a salt in other words."""
    generate = engine.generate

    def salted(scope: ReuseScope) -> ReuseScope:
        return ReuseScope(f"{salts}{scope.cache_salt}")

    engine.storage_scope = salted
    engine.generate = lambda request: generate(replace(request, scope=salted(request.scope)))
