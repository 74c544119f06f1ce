"""TensorRT-LLM's settings and connector base classes, as two of its versions have them.

The settings are pydantic models that know no other fields, like upstream's: what a version lacks
cannot be read from it. The base classes are made from the recorded table of signatures.
"""

import enum
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PrivateAttr
from safetensors.numpy import save_file

from shared_cache.connector.trtllm_facts import ModelFiles, Runtime

TABLE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data/trtllm_connector_api.json").read_text(encoding="utf-8")
)
VERSIONS = {"1.2": "1.2.1", "1.3": "1.3.0rc15", "1.4": "1.4.0rc1"}
"""A version of each release in the table."""

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "torch_dtype": "bfloat16",
}
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}


class Strict(BaseModel):
    """Upstream's base of settings: unknown names are an error."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Policy(str, enum.Enum):
    """Upstream's capacity policies (a string enumeration)."""

    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"


class LoadFormat(enum.Enum):
    """Upstream's load formats (no string enumeration)."""

    AUTO = 0
    DUMMY = 1
    VISION_ONLY = 2


class SchedulerConfig(Strict):
    """`scheduler_config`."""

    capacity_scheduler_policy: Policy = Policy.GUARANTEED_NO_EVICT


class OldKvCacheConfig(Strict):
    """`kv_cache_config` of November 2025."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    host_cache_size: int | None = None
    onboard_blocks: bool = True
    enable_partial_reuse: bool = False
    copy_on_partial_reuse: bool = True
    dtype: str = "auto"
    tokens_per_block: int = 32


class NewKvCacheConfig(OldKvCacheConfig):
    """`kv_cache_config` of 1.3."""

    use_kv_cache_manager_v2: bool | str = False
    disk_cache_size: int | None = None


class QuantConfig(Strict):
    """`quant_config`, which is a private attribute with a property upstream."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None


class OldArgs(Strict):
    """`TorchLlmArgs` of November 2025, as far as a connector reads it."""

    model: str | Path
    revision: str | None = None
    dtype: str = "auto"
    backend: str | None = "pytorch"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    gpus_per_node: int | None = 8
    enable_attention_dp: bool = False
    enable_lora: bool = False
    lora_config: Any = None
    kv_cache_config: OldKvCacheConfig = OldKvCacheConfig()
    cache_transceiver_config: Any = None
    speculative_config: Any = None
    scheduler_config: SchedulerConfig = SchedulerConfig()
    max_beam_width: int | None = None
    max_num_tokens: int | None = 8192
    max_seq_len: int | None = None
    attn_backend: str = "TRTLLM"
    load_format: str | LoadFormat = LoadFormat.AUTO
    mm_encoder_only: bool = False
    orchestrator_type: str | None = None
    _quant_config: QuantConfig = PrivateAttr(default_factory=QuantConfig)
    _rank: int | None = PrivateAttr(default=None)

    @property
    def quant_config(self) -> QuantConfig:
        return self._quant_config

    @property
    def parallel_config(self) -> Any:
        rank = self._rank
        mapping = SimpleNamespace(rank=rank, tp_rank=rank, tp_size=self.tensor_parallel_size)
        return SimpleNamespace(to_mapping=lambda: mapping)


class NewArgs(OldArgs):
    """`TorchLlmArgs` of 1.3."""

    kv_cache_config: NewKvCacheConfig = NewKvCacheConfig()
    sparse_attention_config: Any = None
    ray_worker_extension_cls: str | None = None
    model_kwargs: dict[str, Any] | None = None
    orchestrator_type: str | None = None


Args = Callable[..., OldArgs]


def make_args(kind: type[OldArgs], **settings: Any) -> OldArgs:
    """Settings of the given version; names of `kv_cache_config`'s settings go there."""
    kv_kind = NewKvCacheConfig if kind is NewArgs else OldKvCacheConfig
    kv = {name: settings.pop(name) for name in list(settings) if name in kv_kind.model_fields}
    if "dtype" in kv:  # both sections have one; the engine's own changes nothing here
        settings.setdefault("dtype", "auto")
    rank = settings.pop("rank", None)
    quant = settings.pop("quant", QuantConfig())
    args = kind(
        **{"model": "/no/model", "kv_cache_config": kv_kind(**kv), **settings}  # type: ignore[arg-type]
    )
    args._rank, args._quant_config = rank, quant
    return args


def runtime(version: str = "1.2.1", rank: int = 0, **environment: str) -> Runtime:
    """What a process of that version knows."""
    return Runtime(version, rank, environment)


def files(config: dict[str, Any] | None = None, **changes: Any) -> ModelFiles:
    """A model's JSON files: `config` (default: a small Llama) with `changes`."""
    return ModelFiles({**(config or LLAMA), **changes}, {}, {})


def save_model(folder: Path, config: dict[str, Any] | None = None, fill: float = 0.0) -> Path:
    """A model's folder with weights that are all `fill`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or LLAMA), encoding="utf-8")
    save_file({"w": np.full(64, fill, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def write_package(root: Path, release: str, *, mpi_rank: int = 0) -> None:
    """A `tensorrt_llm` below `root` with the base classes that `release` has, where it has them."""
    package = root / "tensorrt_llm"
    module = package.joinpath(*TABLE[release]["module"].split(".")[1:]).with_suffix(".py")
    module.parent.mkdir(parents=True)
    for folder in (package, *module.parents):
        if package in (folder, *folder.parents):
            (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(
        f"__version__ = {VERSIONS[release]!r}\n\n\ndef mpi_rank():\n    return {mpi_rank}\n",
        encoding="utf-8",
    )
    module.write_text(_source(TABLE[release]), encoding="utf-8")


def _source(table: dict[str, Any]) -> str:
    lines = ["from abc import ABC, abstractmethod"]
    for name in ("KvCacheConnectorScheduler", "KvCacheConnectorWorker"):
        lines += ["", "", f"class {name}(ABC):"]
        for method, told in table[name].items():
            parameters = ", ".join(["self", *told["parameters"]])
            lines += ["    @abstractmethod"] * bool(told.get("abstract"))
            lines += [f"    def {method}({parameters}):"]
            lines += ["        self._llm_args = llm_args"] * (method == "__init__")
            lines += ["        super().__init__()" if method == "__init__" else "        pass"]
    return "\n".join(lines) + "\n"
