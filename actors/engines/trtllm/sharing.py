"""A replica's part in the cache of a TensorRT-LLM engine whose connector runs in other hands.

The connector's two classes are made by TensorRT-LLM, in this process or in those that MPI starts;
they find their settings in a file. What is decided here is who stages, so that what a replica
brings into host memory is what the connector finds: one rank in this process looks up what the
replica has leased, without asking anybody; several ranks ask the owner of the machine's memory,
where this process's leases keep the blocks.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from actors.config import ReplicaConfig
from actors.engines.trtllm.service import SharedPart
from shared_cache.config import CacheConfig
from shared_cache.connector import process
from shared_cache.connector.model_files import read_model
from shared_cache.connector.trtllm_config import (
    CONFIG_VARIABLE,
    ConnectorConfig,
    read_connector_config,
)
from shared_cache.connector.trtllm_facts import Runtime, facts_of
from shared_cache.errors import ConfigError

CLOSE_FLUSH_S = 25.0
"""How long an engine's end waits for its saves."""


def write_connector_config(config: ReplicaConfig, path: Path) -> None:
    """Write the connector's settings for this replica, and name them in the environment."""
    assert config.cache is not None
    cache, is_alone = config.cache, config.engine.tensor_parallel_size == 1
    if not is_alone and cache.host.scope == "process":
        raise ConfigError(
            "cache.host.scope: process is memory of one process, and each of the "
            f"{config.engine.tensor_parallel_size} ranks is one; write scope: node"
        )
    settings = ConnectorConfig(
        **_values(cache),
        match_wait_s=0.0,  # the replica stages, before the engine hears of a request
        staged_ahead=is_alone,
        model=config.model.name,
        revision=config.model.revision,
    )
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    os.environ[CONFIG_VARIABLE] = str(path)


def join_cache(config: ReplicaConfig, version: str, llm_args: Any) -> SharedPart:
    """This process's part in the cache of an `LLM` that has started."""
    runtime = Runtime(version, 0, os.environ)
    if config.engine.tensor_parallel_size == 1:
        joined = process.join(llm_args, runtime)
        return SharedPart(
            joined.facts.namespace_of(0),
            joined.cache,
            # The connector's classes joined too, and nobody tells them that their engine has ended.
            lambda: process.leave_current(CLOSE_FLUSH_S),
            joined.matches,
            joined.shard.gate.saw_prefill,
        )
    _, connector = read_connector_config(runtime.environment)
    files, revision = read_model(llm_args, connector)
    facts = facts_of(llm_args, files, revision, connector, runtime)
    # Ranks save from their own processes; this one brings blocks in for them all.
    shards = process.open_shards(connector, facts, range(facts.tp_size), saving_rank=None)
    cache = process.whole_cache(shards)

    def saw_prefill(spans: Sequence[tuple[int, int]], seconds: float) -> None:
        for shard in shards:
            shard.gate.saw_prefill(spans, seconds)

    return SharedPart(facts.namespace_of(0), cache, cache.close, saw_prefill=saw_prefill)


def _values(cache: CacheConfig) -> dict[str, Any]:
    """The settings of `cache`, as its class's heir takes them."""
    return {name: getattr(cache, name) for name in CacheConfig.model_fields}
