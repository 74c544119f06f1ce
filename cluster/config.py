"""One YAML describes a cluster; whatever is wrong in it is said before anything starts."""

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from actors.config import EngineConfig, ModelSource, ReplicaConfig
from actors.dispatch import DispatchConfig
from actors.router import RouterConfig
from shared_cache.config import DEFAULT_ARENA, CacheConfig, Settings
from shared_cache.settings_file import read_settings, with_expanded_urls


class ServeConfig(Settings):
    """The HTTP endpoint."""

    host: str = Field("127.0.0.1", description="address that `kvcommons up` listens on")
    port: int = Field(8000, ge=1, le=65535, description="port that `kvcommons up` listens on")
    num_ingress: int = Field(1, ge=1, description="processes that take HTTP requests")
    max_ongoing_requests: int = Field(
        256, ge=1, description="requests that one of them serves at the same time"
    )
    max_queued_requests: int = Field(
        256, ge=-1, description="requests that wait beyond that; more get HTTP 503; -1: no limit"
    )
    default_max_tokens: int = Field(
        512, ge=1, description="output of a chat request that sets no limit, where it fits"
    )


class LifecycleConfig(Settings):
    """How replicas are started, watched and stopped."""

    startup_timeout_s: float = Field(
        600.0, gt=0, description="longest time until all replicas have loaded the model"
    )
    health_period_s: float = Field(0.5, gt=0, description="how often replicas are looked at")
    silence_timeout_s: float = Field(
        10.0, gt=0, description="a replica that has not answered for so long gets no requests"
    )
    restart_timeout_s: float = Field(
        60.0, gt=0, description="a replica that has not answered for so long is restarted"
    )
    stall_timeout_s: float = Field(
        120.0, gt=0, description="longest turn of an engine; a longer one means a restart"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="on stop, longest wait for running requests and queued saves"
    )


class ClusterConfig(Settings):
    """A whole cluster."""

    name: str = Field(
        "kvcommons",
        pattern=r"^[a-z][a-z0-9-]*$",
        description="beginning of the actors' names; two clusters in one Ray need two names",
    )
    model: str = Field(description="an alias (smollm2-135m), a folder, or a Hugging Face hub id")
    replicas: int = Field(2, ge=1, description="how many replicas")
    num_cpus_per_replica: float = Field(1, ge=0, description="CPUs that Ray reserves for each")
    num_gpus_per_replica: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves for each; default: engine.tensor_parallel_size with "
        "kind: trtllm, else 0",
    )
    engine: EngineConfig = EngineConfig()
    cache: CacheConfig | None = Field(
        None, description="the shared cache; null: each replica has its device pool alone"
    )
    router: RouterConfig = RouterConfig()
    dispatch: DispatchConfig = DispatchConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    serve: ServeConfig = ServeConfig()

    @field_validator("cache")
    @classmethod
    def _expand_urls(cls, cache: CacheConfig | None) -> CacheConfig | None:
        return None if cache is None else with_expanded_urls(cache)

    @model_validator(mode="after")
    def _replicas_are_valid(self) -> "ClusterConfig":
        placeholder = ModelSource(name=self.model, path="", revision="")
        ReplicaConfig(name="check", model=placeholder, engine=self.engine, cache=self.cache)
        return self

    @model_validator(mode="after")
    def _gpus_for_every_rank(self) -> "ClusterConfig":
        needed = self.engine.tensor_parallel_size
        if self.engine.kind == "trtllm" and self.gpus_per_replica != needed:
            raise ValueError(
                f"num_gpus_per_replica ({self.gpus_per_replica:g}) must be "
                f"engine.tensor_parallel_size ({needed}) with kind: trtllm, one GPU for each rank; "
                "remove num_gpus_per_replica, it is then set by itself"
            )
        return self

    @property
    def gpus_per_replica(self) -> float:
        """GPUs that Ray reserves for each replica, all on one machine."""
        if self.num_gpus_per_replica is not None:
            return self.num_gpus_per_replica
        return self.engine.tensor_parallel_size if self.engine.kind == "trtllm" else 0

    @property
    def replica_names(self) -> tuple[str, ...]:
        """The names of the replica actors."""
        return tuple(f"{self.name}-replica-{index}" for index in range(self.replicas))

    @property
    def replica_cache(self) -> CacheConfig | None:
        """The cache section as replicas get it.

        The cluster runs the arena's owner, and the arena bears the cluster's name by default: two
        clusters on one machine do not take each other's memory.
        """
        if self.cache is None:
            return None
        name = self.name if self.cache.host.name == DEFAULT_ARENA else self.cache.host.name
        host = self.cache.host.model_copy(update={"name": name, "start_owner": False})
        return self.cache.model_copy(update={"host": host})

    @property
    def router_name(self) -> str:
        """The name of the router actor."""
        return f"{self.name}-router"


def load_config(path: str | Path) -> ClusterConfig:
    """The cluster that the YAML file describes; `ConfigError` names what is wrong, and the fix."""
    return read_settings(Path(path), ClusterConfig, "model: smollm2-135m")
