"""Settings of a replica and its engine, with TensorRT-LLM's names where the meaning is the same."""

from typing import Any, Literal

from pydantic import ByteSize, Field, model_validator

from shared_cache.config import CacheConfig, Settings

DEFAULT_POOL_TOKENS = 16384

TrtllmMode = Literal["shared", "offload", "ngram", "plain"]
"""What a TensorRT-LLM engine does besides serving; they exclude one another there."""


class KvCacheConfig(Settings):
    """The engine's own KV pool (`KvCacheConfig` in TensorRT-LLM)."""

    tokens_per_block: int = Field(32, ge=1, le=1024, description="tokens in one block")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens that the pool holds; default: 16384 in the embedded engine, in "
        "TensorRT-LLM what `free_gpu_memory_fraction` leaves",
    )
    free_gpu_memory_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="TensorRT-LLM only: part of the memory left after loading the model that the "
        "pool takes (its default: 0.9); with `max_tokens`, the smaller one counts",
    )
    enable_block_reuse: bool = Field(
        True, description="keep finished blocks on the device and use them again"
    )
    host_cache_size: ByteSize | None = Field(
        None, description="host memory of this engine alone for evicted blocks; excludes `cache`"
    )

    @property
    def pool_tokens(self) -> int:
        """Tokens that the embedded engine's pool holds."""
        return DEFAULT_POOL_TOKENS if self.max_tokens is None else self.max_tokens


class NGramConfig(Settings):
    """N-gram (prompt look-up) speculative decoding (`NGramDecodingConfig` in TensorRT-LLM)."""

    decoding_type: Literal["NGram"] = "NGram"
    max_draft_len: int = Field(10, ge=1, le=64, description="tokens drafted at most in one turn")
    max_matching_ngram_size: int = Field(
        3, ge=1, le=16, description="longest run of last tokens that is looked up in the context"
    )


class CudaGraphConfig(Settings):
    """Which forward passes are replayed as CUDA graphs; embedded engine on a GPU."""

    max_num_tokens: int = Field(
        256,
        ge=1,
        description="passes over at most so many tokens (decoding, drafts, the tail of a prompt "
        "that was found in the cache) are captured, in sizes up to that",
    )


class EngineConfig(Settings):
    """One engine."""

    kind: Literal["torch", "trtllm"] = Field(
        "torch", description="torch: the embedded engine; trtllm: TensorRT-LLM"
    )
    device: str = Field(
        "cpu", description="torch device; TensorRT-LLM takes the GPUs that Ray gives its replica"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of weights and KV; auto: in the embedded engine float32 on a CPU, which keeps "
        "greedy output exact, and bfloat16 on a GPU; in TensorRT-LLM the model's own",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="GPUs of one machine that share a model; TensorRT-LLM only"
    )
    llm_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further keyword arguments of TensorRT-LLM's `LLM(...)`, passed on as they "
        "are; those under `kv_cache_config` go to its `KvCacheConfig`",
    )
    max_batch_size: int = Field(8, ge=1, description="requests that run at the same time")
    max_waiting_requests: int = Field(
        512, ge=0, description="requests that one replica holds beyond those; more go elsewhere"
    )
    max_num_tokens: int = Field(
        512, ge=1, description="tokens computed in one turn; longer prompts go in chunks"
    )
    max_seq_len: int | None = Field(None, ge=2, description="default: what the model supports")
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="dummy: seeded random weights of the model's shape, made on the device, for "
        "benchmarks; embedded engine only",
    )
    attention: Literal["auto", "flashinfer", "varlen", "sdpa"] = Field(
        "auto",
        description="embedded engine: flashinfer: fused layers and CUDA graphs, on NVIDIA GPUs "
        "with the extra `cuda`; varlen: torch's own kernel over a block table; sdpa: blocks are "
        "gathered; auto: the first one that can be used",
    )
    cuda_graph_config: CudaGraphConfig | None = Field(
        CudaGraphConfig(), description="embedded engine with flashinfer; null: no CUDA graphs"
    )
    disable_overlap_scheduler: bool = Field(
        False,
        description="true: a turn begins only when the tokens of the one before it are known; "
        "else it is launched before, which hides the host's work: in TensorRT-LLM, and in the "
        "embedded engine with CUDA graphs; never with n-gram drafts",
    )
    torch_threads: int | None = Field(None, ge=1, description="default: torch's own choice")
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    speculative_config: NGramConfig | None = None

    @property
    def torch_dtype(self) -> str:
        """The embedded engine's dtype."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.is_cuda else "float32"

    @property
    def is_cuda(self) -> bool:
        """Whether the embedded engine computes on an NVIDIA GPU."""
        return self.device.partition(":")[0] == "cuda"

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

    @model_validator(mode="after")
    def _one_engine_s_settings(self) -> "EngineConfig":
        problem = _not_for_torch(self) if self.kind == "torch" else _not_for_trtllm(self)
        if problem is not None:
            raise ValueError(problem)
        return self


def _not_for_torch(engine: EngineConfig) -> str | None:
    """What only TensorRT-LLM can do of these settings."""
    kv = engine.kv_cache_config
    given = {
        "tensor_parallel_size": engine.tensor_parallel_size != 1,
        "llm_args": bool(engine.llm_args),
        "kv_cache_config.free_gpu_memory_fraction": kv.free_gpu_memory_fraction is not None,
    }
    names = ", ".join(name for name, is_given in given.items() if is_given)
    if not names:
        return None
    return f"the embedded engine has no {names}: remove that, or set kind: trtllm"


def _not_for_trtllm(engine: EngineConfig) -> str | None:
    """What TensorRT-LLM cannot do of these settings."""
    if engine.device != "cpu":
        return (
            f"kind: trtllm takes the GPUs that Ray gives the replica, so it cannot heed device "
            f"({engine.device}): remove it and set tensor_parallel_size"
        )
    if engine.load_format != "auto" or engine.attention != "auto":
        return "kind: trtllm heeds neither load_format nor attention: put them into llm_args"
    if engine.torch_threads is not None:
        return "kind: trtllm computes on GPUs, so it cannot heed torch_threads: remove it"
    if engine.speculative_config is not None and engine.kv_cache_config.host_cache_size is not None:
        return (
            "kind: trtllm does one of two: keep evicted blocks in host memory "
            "(kv_cache_config.host_cache_size) or draft n-grams (speculative_config); remove one"
        )
    return None


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

    @property
    def trtllm_mode(self) -> TrtllmMode:
        """What a TensorRT-LLM engine with these settings does besides serving."""
        if self.cache is not None:
            return "shared"
        if self.engine.kv_cache_config.host_cache_size is not None:
            return "offload"
        return "plain" if self.engine.speculative_config is None else "ngram"

    @model_validator(mode="after")
    def _no_drafts_beside_a_connector(self) -> "ReplicaConfig":
        engine = self.engine
        drafts = engine.speculative_config is not None or "speculative_config" in engine.llm_args
        if engine.kind == "trtllm" and self.cache is not None and drafts:
            raise ValueError(
                "cache and engine.speculative_config exclude one another with kind: trtllm: "
                "TensorRT-LLM 1.2 refuses drafts beside a KV cache connector, and later versions "
                "can hang; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_host_tier(self) -> "ReplicaConfig":
        if self.cache is not None and self.engine.kv_cache_config.host_cache_size is not None:
            raise ValueError(
                "engine.kv_cache_config.host_cache_size and cache exclude one another, as in "
                "TensorRT-LLM; remove host_cache_size and set cache.host.bytes instead"
            )
        return self
