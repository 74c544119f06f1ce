"""What the replicas need of Ray's machines, checked before an actor is asked for.

An actor that Ray can never place waits in silence, and the start ends in a time-out that names
nothing. A replica of several ranks is placed only on a machine that has all its GPUs, so a sum over
machines is no answer for those.
"""

import time
from collections.abc import Callable

import ray

from cluster.config import ClusterConfig
from shared_cache.errors import ConfigError

FREE_RESOURCES_TIMEOUT_S = 15.0


def await_resources(config: ClusterConfig) -> float:
    """Ray's CPUs; raises `ConfigError` when the replicas cannot all be placed.

    Waits a little for what is just being freed, by a cluster that was stopped before.
    """
    if config.gpus_per_replica:
        _check_machines(config)
        _await_free(
            "GPU",
            config.min_replicas * config.gpus_per_replica,
            f"{config.min_replicas} replicas with {config.gpus_per_replica:g} GPUs each",
            "or lower `replicas`",
        )
    return _await_free(
        "CPU",
        config.min_replicas * config.num_cpus_per_replica,
        f"{config.min_replicas} replicas with num_cpus_per_replica: "
        f"{config.num_cpus_per_replica:g}",
        "or lower `replicas` or `num_cpus_per_replica` (0.5 is fine: it only schedules)",
    )


def _check_machines(config: ClusterConfig) -> None:
    machines = [one["Resources"].get("GPU", 0.0) for one in ray.nodes() if one["Alive"]]
    places = int(sum(gpus // config.gpus_per_replica for gpus in machines))
    if places < config.min_replicas:
        found = ", ".join(f"{gpus:g}" for gpus in machines) or "none"
        raise ConfigError(
            f"{config.min_replicas} replicas need {config.gpus_per_replica:g} GPUs each on one "
            f"machine, and Ray's machines have {found}: {places} fit. Lower `replicas` or "
            "`engine.tensor_parallel_size`, add machines, or check with `ray status` that Ray sees "
            "the GPUs (`ray start --num-gpus` sets them by hand)"
        )


def _await_free(resource: str, needed: float, who: str, advice: str) -> float:
    """All of `resource` that Ray has, once `needed` of it is free."""
    total = _amount(ray.cluster_resources, resource)
    deadline_s = time.monotonic() + FREE_RESOURCES_TIMEOUT_S
    while needed > (free := _amount(ray.available_resources, resource)):
        if needed > total or time.monotonic() > deadline_s:
            raise ConfigError(
                f"{who} need {needed:g} {resource}s, but Ray has {total:g}, of which {free:g} are "
                f"free; stop what uses the others, {advice}"
            )
        time.sleep(0.1)
    return total


def _amount(ask: Callable[[], dict[str, float]], resource: str) -> float:
    return float(ask().get(resource, 0.0))
