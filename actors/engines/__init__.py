"""Engines that a replica can own."""

from actors.config import ReplicaConfig
from actors.engine import Engine


def build_engine(config: ReplicaConfig) -> Engine:
    """The engine that `config.engine.kind` names, running.

    Raises `ConfigError` or `ModelError`. Engines are imported when they are wanted: each has heavy
    dependencies that the others do not need.
    """
    from actors.engines.torch.build import build_torch_engine

    return build_torch_engine(config)
