"""Clusters of TensorRT-LLM replicas: GPUs for every rank, on one machine, or a clear refusal."""

from pathlib import Path

import pytest

from cluster import ray_resources
from cluster.config import ClusterConfig, load_config
from cluster.ray_resources import await_resources
from shared_cache.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
TRTLLM = {"kind": "trtllm"}


def test_a_replica_has_a_gpu_for_each_rank():
    one = load_config(CONFIGS / "trtllm-llama8b.yaml")
    two = load_config(CONFIGS / "trtllm-tp2.yaml")
    assert (one.gpus_per_replica, one.replicas) == (1, 8)
    assert (two.gpus_per_replica, two.replicas) == (2, 4)
    assert one.engine.kv_cache_config.max_tokens is None
    assert one.cache is not None
    assert ClusterConfig(model="x").gpus_per_replica == 0
    assert ClusterConfig(model="x", num_gpus_per_replica=0.5).gpus_per_replica == 0.5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_gpus_per_replica": 1, "engine": {**TRTLLM, "tensor_parallel_size": 2}}, "is then"),
        ({"cache": {}, "engine": {**TRTLLM, "speculative_config": {}}}, r"1\.2 refuses drafts"),
        ({"cache": {}, "engine": {**TRTLLM, "device": "cuda"}}, "device"),
    ],
)
def test_what_cannot_work(settings, named):
    with pytest.raises(ValueError, match=named):
        ClusterConfig(model="x", **settings)


class FakeRay:
    """Machines with so many GPUs each, and what is free of them."""

    def __init__(self, *gpus, free=None, cpus=64):
        self.gpus, self.free, self.cpus = gpus, sum(gpus) if free is None else free, cpus

    def nodes(self):
        return [{"Alive": True, "Resources": {"GPU": n} if n else {}} for n in self.gpus]

    def cluster_resources(self):
        return {"GPU": float(sum(self.gpus)), "CPU": float(self.cpus)}

    def available_resources(self):
        return {"GPU": float(self.free), "CPU": float(self.cpus)}


def cluster(tp_size, replicas):
    engine = {**TRTLLM, "tensor_parallel_size": tp_size}
    return ClusterConfig(model="x", replicas=replicas, engine=engine)


def test_replicas_are_placed_on_whole_machines(monkeypatch):
    monkeypatch.setattr(ray_resources, "ray", FakeRay(3, 0, 5))
    assert await_resources(cluster(2, 3)) == 64
    with pytest.raises(ConfigError, match=r"machines have 3, 0, 5: 3 fit"):
        await_resources(cluster(2, 4))
    with pytest.raises(ConfigError, match=r"need 8 GPUs each on one machine"):
        await_resources(cluster(8, 1))


def test_gpus_that_others_hold_are_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(ray_resources, "ray", FakeRay(8, free=3))
    monkeypatch.setattr(ray_resources, "FREE_RESOURCES_TIMEOUT_S", 0.05)
    with pytest.raises(ConfigError, match="need 4 GPUs, but Ray has 8, of which 3 are free"):
        await_resources(cluster(2, 2))
