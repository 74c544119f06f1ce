"""The two classes that TensorRT-LLM's configuration names; usable without Ray.

    kv_connector_config:
      connector_module: shared_cache.connector.tensorrt_llm
      connector_scheduler_class: SharedCacheScheduler
      connector_worker_class: SharedCacheWorker

They add only what TensorRT-LLM's constructors need, so that all behaviour is in classes that are
tested without it. Written from TensorRT-LLM's source; these lines were never run on it.
"""

import os
from typing import Any

import tensorrt_llm

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ModuleNotFoundError as error:  # before 1.3.0rc14
    if not (error.name or "").startswith("tensorrt_llm._torch.pyexecutor.connectors"):
        raise
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )

from shared_cache.connector import process, scheduler, worker
from shared_cache.connector.trtllm_facts import Runtime


class SharedCacheScheduler(
    scheduler.SharedCacheScheduler,
    KvCacheConnectorScheduler,  # type: ignore[misc]
):
    """The scheduler side: one per engine, on rank 0."""

    def __init__(self, llm_args: Any) -> None:
        """Open the cache that `TLLM_SHARED_CACHE_CONFIG` describes; errors say how to mend it."""
        joined = process.join(llm_args, _runtime())
        size = joined.facts.layout.tokens_per_block
        scheduler.SharedCacheScheduler.__init__(
            self, joined.cache, size, joined.rule, matches=joined.matches
        )
        KvCacheConnectorScheduler.__init__(self, llm_args)


class SharedCacheWorker(
    worker.SharedCacheWorker,
    KvCacheConnectorWorker,  # type: ignore[misc]
):
    """The worker side: one per rank."""

    def __init__(self, llm_args: Any) -> None:
        """Open the cache that `TLLM_SHARED_CACHE_CONFIG` describes; errors say how to mend it."""
        joined = process.join(llm_args, _runtime())
        facts = joined.facts
        worker.SharedCacheWorker.__init__(self, joined.shard, facts.tp_rank, facts.layout)
        KvCacheConnectorWorker.__init__(self, llm_args)
        joined.on_close(self.close)  # TensorRT-LLM has no call that ends a worker


def _runtime() -> Runtime:
    return Runtime(tensorrt_llm.__version__, tensorrt_llm.mpi_rank(), os.environ)
