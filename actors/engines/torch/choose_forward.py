"""Which way a turn is computed on this device, with these settings, or why not as asked."""

import logging

import torch

from actors.config import EngineConfig
from actors.engines.torch import varlen
from actors.engines.torch.cuda import kernels
from actors.engines.torch.cuda.buckets import PassSizes
from actors.engines.torch.cuda.forward import CudaForward
from actors.engines.torch.forward import Forward, PlainForward
from actors.engines.torch.model import LoadedModel
from actors.engines.torch.pool import PagedPool
from shared_cache.errors import ConfigError

logger = logging.getLogger(__name__)


def make_forward(
    model: LoadedModel, pool: PagedPool, config: EngineConfig, max_positions: int
) -> Forward:
    """The way that `config.attention` names. Raises `ConfigError` when that cannot be here."""
    wanted, problem = config.attention, why_not_flashinfer(model, pool)
    if wanted == "flashinfer" and problem is not None:
        raise ConfigError(f"engine.attention flashinfer: {problem}; or set attention: auto")
    if wanted in ("flashinfer", "auto") and problem is None:
        graphs = config.cuda_graph_config
        sizes = None
        if graphs is not None:
            most = min(graphs.max_num_tokens, config.max_num_tokens)
            sizes = PassSizes(min(config.max_batch_size, most), most)
        return CudaForward(model, pool, max_positions, config.max_batch_size, sizes)
    if wanted == "varlen":
        _check_varlen(pool)
        return PlainForward(model, pool, varlen.VarlenPass, config.max_batch_size)
    if config.is_cuda and wanted == "auto":
        logger.warning("engine.attention falls back to sdpa, which is slow on a GPU: %s", problem)
    return PlainForward(model, pool, max_sequences=config.max_batch_size)


def why_not_flashinfer(model: LoadedModel, pool: PagedPool) -> str | None:
    """What keeps this engine from FlashInfer, with the fix; None: nothing."""
    if not pool.tensor.is_cuda:
        return "it needs an NVIDIA GPU; set engine.device: cuda"
    if not kernels.is_installed():
        return "FlashInfer is not installed; pip install 'kvcommons[cuda]'"
    if pool.tensor.dtype not in kernels.DTYPES:
        return "it computes bfloat16 and float16 only; set engine.dtype: bfloat16"
    if pool.layout.head_dim not in kernels.HEAD_DIMS:
        return f"it has no kernel for heads of {pool.layout.head_dim} numbers"
    if getattr(model.config, "hidden_act", "silu") != "silu":
        return f"its layers have SiLU, this model has {model.config.hidden_act}"
    return None


def _check_varlen(pool: PagedPool) -> None:
    if not pool.tensor.is_cuda or pool.tensor.dtype == torch.float32:
        raise ConfigError(
            "engine.attention varlen computes bfloat16 and float16 on a GPU only; set "
            "engine.device: cuda and dtype: bfloat16, or attention: sdpa"
        )
    if not varlen.has_block_table():
        raise ConfigError(
            f"torch {torch.__version__} has no varlen_attn with a block table: install torch 2.13 "
            "or newer, or set engine.attention: sdpa"
        )
