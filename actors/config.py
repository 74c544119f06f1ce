"""Settings of a replica and its engine, with TensorRT-LLM's names where the meaning is the same."""

from typing import Literal

from pydantic import ByteSize, Field, model_validator

from shared_cache.config import CacheConfig, Settings


class KvCacheConfig(Settings):
    """The engine's own KV pool (`KvCacheConfig` in TensorRT-LLM)."""

    tokens_per_block: int = Field(32, ge=1, le=1024, description="tokens in one block")
    max_tokens: int = Field(16384, ge=1, description="tokens that the pool holds")
    enable_block_reuse: bool = Field(
        True, description="keep finished blocks on the device and use them again"
    )
    host_cache_size: ByteSize | None = Field(
        None, description="host memory of this engine alone for evicted blocks; excludes `cache`"
    )


class NGramConfig(Settings):
    """N-gram (prompt look-up) speculative decoding (`NGramDecodingConfig` in TensorRT-LLM)."""

    decoding_type: Literal["NGram"] = "NGram"
    max_draft_len: int = Field(10, ge=1, le=64, description="tokens drafted at most in one turn")
    max_matching_ngram_size: int = Field(
        3, ge=1, le=16, description="longest run of last tokens that is looked up in the context"
    )


class EngineConfig(Settings):
    """One engine."""

    kind: Literal["torch"] = "torch"
    device: str = Field("cpu", description="torch device")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of weights and KV; on a CPU float32 keeps greedy output exact"
    )
    max_batch_size: int = Field(8, ge=1, description="requests that run at the same time")
    max_waiting_requests: int = Field(
        512, ge=0, description="requests that one replica holds beyond those; more go elsewhere"
    )
    max_num_tokens: int = Field(
        512, ge=1, description="tokens computed in one turn; longer prompts go in chunks"
    )
    max_seq_len: int | None = Field(None, ge=2, description="default: what the model supports")
    torch_threads: int | None = Field(None, ge=1, description="default: torch's own choice")
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    speculative_config: NGramConfig | None = None

    @property
    def max_outstanding(self) -> int:
        """Requests that one replica takes at the same time, running or waiting."""
        return self.max_batch_size + self.max_waiting_requests

    @model_validator(mode="after")
    def _a_turn_holds_what_it_must(self) -> "EngineConfig":
        block = self.kv_cache_config.tokens_per_block
        if self.max_num_tokens < block:
            raise ValueError(
                f"max_num_tokens ({self.max_num_tokens}) is below tokens_per_block ({block}); "
                "raise it to at least that"
            )
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens ({self.max_num_tokens}) is below max_batch_size "
                f"({self.max_batch_size}), so one turn could not serve every request; raise it to "
                "at least that"
            )
        return self


class ModelSource(Settings):
    """Weights on this machine and what identifies them everywhere.

    `revision` is a digest of the weights: two replicas share blocks only when it is equal.
    """

    name: str
    path: str
    revision: str


class ReplicaConfig(Settings):
    """One replica: a name, a model, an engine, and its part in the shared cache."""

    name: str
    model: ModelSource
    engine: EngineConfig = EngineConfig()
    cache: CacheConfig | None = None

    @model_validator(mode="after")
    def _one_host_tier(self) -> "ReplicaConfig":
        if self.cache is not None and self.engine.kv_cache_config.host_cache_size is not None:
            raise ValueError(
                "engine.kv_cache_config.host_cache_size and cache exclude one another, as in "
                "TensorRT-LLM; remove host_cache_size and set cache.host.bytes instead"
            )
        return self
