"""Engines that a replica can own."""

from importlib.metadata import version

from actors.config import ReplicaConfig
from actors.engine import Engine
from shared_cache.errors import ConfigError

EMBEDDED_TRANSFORMERS = 5
"""The embedded engine's layers are those of this major version; TensorRT-LLM 1.2 pins an older."""


def build_engine(config: ReplicaConfig) -> Engine:
    """The engine that `config.engine.kind` names, running.

    Raises `ConfigError` or `ModelError`. Engines are imported when they are wanted: each has heavy
    dependencies that the others do not need.
    """
    if config.engine.kind == "trtllm":
        from actors.engines.trtllm.build import build_trtllm_engine

        return build_trtllm_engine(config)
    installed = version("transformers")
    if int(installed.partition(".")[0]) < EMBEDDED_TRANSFORMERS:
        raise ConfigError(
            f"engine.kind torch needs transformers {EMBEDDED_TRANSFORMERS}, here is {installed}: "
            "pip install 'kvcommons[embedded]', or set engine.kind to trtllm"
        )
    from actors.engines.torch.build import build_torch_engine

    return build_torch_engine(config)
