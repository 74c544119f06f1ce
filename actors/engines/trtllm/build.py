"""From a replica's settings to a running TensorRT-LLM engine.

What must happen in this order, or goes wrong late: GPU memory of an engine that ended before is
free; the environment says where TensorRT-LLM runs and where the connector finds its settings; the
`LLM` is made; this process joins the cache; a first token comes out.
"""

import contextlib
import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from actors.config import ModelSource, ReplicaConfig
from actors.engines.tokenizer import eos_token_ids, load_tokenizer
from actors.engines.trtllm.api import TrtllmApi, load_api
from actors.engines.trtllm.arguments import llm_arguments
from actors.engines.trtllm.engine import TrtllmEngine
from actors.engines.trtllm.gpu_memory import (
    GpuMemory,
    await_memory,
    still_used,
    users_of,
    visible_gpus,
)
from actors.engines.trtllm.service import ServedModel, SharedPart
from actors.engines.trtllm.sharing import join_cache, write_connector_config
from shared_cache.connector import process
from shared_cache.errors import ConfigError, KvcommonsError, ModelError
from shared_cache.namespace import BlockLayout, Namespace

logger = logging.getLogger(__name__)

IN_PROCESS = "TLLM_WORKER_USE_SINGLE_PROCESS"
"""Set to 1: TensorRT-LLM runs its one rank in the process that makes the `LLM`."""

ROOT_VARIABLES = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
FREE_TIMEOUT_S = 60.0
BUSY_SHARE = 0.1
"""Part of a GPU's memory that may be in use before an engine starts there."""

SLACK_BYTES = 2 << 30
"""What this process keeps on a GPU after its engine: CUDA's context, its libraries' memory."""


def build_trtllm_engine(config: ReplicaConfig) -> TrtllmEngine:
    """The engine, after its first token, with its part in the cache opened.

    Raises `ConfigError` or `ModelError`; nothing stays open then.
    """
    api = load_api()
    arguments = llm_arguments(config, api)
    served = _served_model(config, arguments)
    before = _await_free_gpus()
    with tempfile.TemporaryDirectory(prefix="kvcommons-") as folder:
        _set_environment(config, Path(folder))
        llm = _make_llm(api, arguments)
        try:
            part = _shared_part(config, api, llm)
            engine = TrtllmEngine(llm, api, served, part, config.trtllm_mode, _ending(before))
        except BaseException:
            llm.shutdown()
            process.leave_current(0.0)
            raise
    return _checked(engine)


def _checked(engine: TrtllmEngine) -> TrtllmEngine:
    """The engine once a token has come out of it; closed, when none does."""
    try:
        engine.check()
    except KvcommonsError as error:
        with contextlib.suppress(KvcommonsError):  # the first error says why
            engine.close()
        raise ModelError(f"the model does not run: {error}") from error
    return engine


def _make_llm(api: TrtllmApi, arguments: Mapping[str, Any]) -> Any:
    try:
        return api.llm(**arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"TensorRT-LLM {api.version} refuses these settings: {error}; correct engine.llm_args, "
            "or what docs/tensorrt-llm.md says of this combination"
        ) from error
    except (KvcommonsError, OSError, RuntimeError) as error:
        raise ModelError(f"TensorRT-LLM {api.version} does not start: {error}") from error


def _set_environment(config: ReplicaConfig, folder: Path) -> None:
    """What `LLM(...)` and its ranks read. Only names that begin with `TLLM` surely reach them."""
    if config.engine.tensor_parallel_size == 1:
        os.environ[IN_PROCESS] = "1"
    else:
        os.environ.pop(IN_PROCESS, None)
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # else MPI starts no ranks in a container
            for name in ROOT_VARIABLES:
                os.environ.setdefault(name, "1")
    if config.cache is not None:
        write_connector_config(config, folder / "connector.yaml")


def _shared_part(config: ReplicaConfig, api: TrtllmApi, llm: Any) -> SharedPart:
    if config.cache is not None:
        return join_cache(config, api.version, llm.args)
    # Nothing is shared, so nobody reads more of the layout than its tokens.
    layout = BlockLayout(1, 1, 1, config.engine.kv_cache_config.tokens_per_block, 1, "float16")
    namespace = Namespace(config.model.name, config.model.revision, "tensorrt_llm", layout)
    return SharedPart(namespace, None, lambda: None)


def _served_model(config: ReplicaConfig, arguments: Mapping[str, Any]) -> ServedModel:
    source, engine = config.model, config.engine
    tokenizer = load_tokenizer(source)
    text = _text_config(source)
    supported = int(text.get("max_position_embeddings") or 0) or sys.maxsize
    chunked = arguments["enable_chunked_prefill"]
    return ServedModel(
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(_generation_config(source), tokenizer),
        vocab_size=int(text.get("vocab_size") or len(tokenizer)),
        max_total_tokens=min(engine.max_seq_len or supported, supported),
        max_prompt_tokens=None if chunked else engine.max_num_tokens,
    )


def _text_config(source: ModelSource) -> Mapping[str, Any]:
    path = Path(source.path, "config.json")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config.get("text_config") or config
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {source.name!r}: {path} cannot be read ({error}); give the folder of a model "
            "in the transformers format"
        ) from error


def _generation_config(source: ModelSource) -> Any:
    try:
        return GenerationConfig.from_pretrained(source.path, local_files_only=True)
    except OSError:  # there need not be one: the tokenizer's end token then suffices
        return None


def _await_free_gpus() -> tuple[GpuMemory, ...]:
    """What the GPUs hold before the engine, once what ended before has given its memory back."""
    full = await_memory(lambda gpu: int(BUSY_SHARE * gpu.total_bytes), FREE_TIMEOUT_S)
    for gpu in full:
        logger.warning(
            "GPU %d has %.1f of %.1f GiB in use before the engine starts (%s): if it fails for "
            "want of memory, end those processes or lower free_gpu_memory_fraction",
            gpu.index,
            gpu.used_bytes / (1 << 30),
            gpu.total_bytes / (1 << 30),
            users_of([gpu]),
        )
    return visible_gpus()


def _ending(before: tuple[GpuMemory, ...]) -> Callable[[], None]:
    """Give what is left of the engine back, and wait until its GPU memory is free."""
    used = {gpu.uuid: gpu.used_bytes for gpu in before}

    def end() -> None:
        gc.collect()
        _empty_cuda_cache()
        if not used:
            return
        allowed = lambda gpu: used.get(gpu.uuid, gpu.total_bytes) + SLACK_BYTES  # noqa: E731
        full = await_memory(allowed, FREE_TIMEOUT_S)
        if full:
            raise still_used(full, FREE_TIMEOUT_S)

    return end


def _empty_cuda_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
