"""One YAML describes a cluster; whatever is wrong in it is said before anything starts."""

from pathlib import Path

from pydantic import ByteSize, Field, field_validator, model_validator

from actors.config import EngineConfig, ModelSource, ReplicaConfig
from actors.dispatch import DispatchConfig
from actors.router_config import RouterConfig
from actors.routing.shards import router_name
from shared_cache.config import DEFAULT_ARENA, CacheConfig, Settings
from shared_cache.settings_file import read_settings, with_expanded_urls


class IngressScale(Settings):
    """Processes that take HTTP requests; Serve adds and removes them by itself."""

    min: int = Field(1, ge=1, description="fewest processes")
    max: int = Field(1, ge=1, description="most processes")
    target_requests: float = Field(
        64.0, gt=0, description="requests in one process at which another one is added"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "IngressScale":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max}); swap them")
        return self


class ServeConfig(Settings):
    """The HTTP endpoint."""

    host: str = Field("127.0.0.1", description="address that `kvcommons up` listens on")
    port: int = Field(8000, ge=1, le=65535, description="port that `kvcommons up` listens on")
    ingress: IngressScale = IngressScale()
    max_places: int = Field(
        256,
        ge=1,
        description="choices that one ingress has running or waiting; more get HTTP 429 with the "
        "time after which places were free at the measured rate",
    )
    max_queued_requests: int = Field(
        256,
        ge=0,
        description="requests that Serve's proxy holds beyond those of all ingresses; more get "
        "HTTP 503 from Serve itself",
    )
    max_body_bytes: ByteSize = Field(
        ByteSize(16 << 20), gt=0, description="longest body of a request; more get HTTP 413"
    )
    request_timeout_s: float = Field(
        600.0, gt=0, description="longest time that a request may take, streams included"
    )
    default_max_tokens: int = Field(
        512, ge=1, description="output of a chat request that sets no limit, where it fits"
    )
    keys_file: str | None = Field(
        None,
        description="YAML of tenants and hashed API keys (`kvcommons keys create` writes it); read "
        "again when it changes. Without it, and without the variable below, there are no keys",
    )
    keys_environment: str = Field(
        "KVCOMMONS_KEYS",
        description="environment variable that holds the same document, if there is no file",
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
    metrics_period_s: float = Field(
        5.0, gt=0, description="how often figures of replicas and router go to the metrics"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="on stop, longest wait for running requests and queued saves"
    )


class ReplicaRange(Settings):
    """How many replicas there are at least and at most; the driver changes that with the load."""

    min: int = Field(1, ge=1, description="replicas that are always there")
    max: int = Field(ge=1, description="replicas that are there under load")

    @model_validator(mode="after")
    def _is_a_range(self) -> "ReplicaRange":
        if self.min > self.max:
            raise ValueError(f"replicas.min ({self.min}) is more than replicas.max ({self.max})")
        return self


class ScalingConfig(Settings):
    """When replicas are added and removed, where `replicas` is a range.

    Load is what the replicas have to do over what they can do at the same time: 1 is full batches
    and nobody waiting.
    """

    high_load: float = Field(1.0, gt=0, description="load above which one is added")
    low_load: float = Field(
        0.5, ge=0, description="load below which one is removed, if it stays below without it"
    )
    up_after_s: float = Field(15.0, ge=0, description="how long load must have been high")
    down_after_s: float = Field(300.0, ge=0, description="how long load must have been low")
    pause_s: float = Field(30.0, ge=0, description="least time between two changes")
    warm_timeout_s: float = Field(
        30.0, ge=0, description="longest time to give a new replica the hottest prefixes"
    )

    @model_validator(mode="after")
    def _leaves_a_gap(self) -> "ScalingConfig":
        if self.low_load >= self.high_load:
            raise ValueError(
                f"low_load ({self.low_load:g}) must be below high_load ({self.high_load:g}), or "
                "replicas would come and go"
            )
        return self


class DoctorConfig(Settings):
    """Canaries: a prefix that one replica has stored is asked of every other one."""

    period_s: float | None = Field(
        300.0, gt=0, description="time between two rounds; null: no canaries, also not at start"
    )
    required: bool = Field(
        True,
        description="the endpoint is ready (`/ready`) only after a round without a failure; later "
        "failures are logged and in the metrics",
    )


class ClusterConfig(Settings):
    """A whole cluster."""

    name: str = Field(
        "kvcommons",
        pattern=r"^[a-z][a-z0-9-]*$",
        description="beginning of the actors' names; two clusters in one Ray need two names",
    )
    model: str = Field(description="an alias (smollm2-135m), a folder, or a Hugging Face hub id")
    replicas: int | ReplicaRange = Field(
        2,
        union_mode="left_to_right",
        description="how many replicas, or a range: `{min: 1, max: 8}`; see `scaling`",
    )
    num_cpus_per_replica: float = Field(1, ge=0, description="CPUs that Ray reserves for each")
    num_gpus_per_replica: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves for each; default: engine.tensor_parallel_size with "
        "kind: trtllm; 1 with engine.device: cuda, which may be a part of one; else 0",
    )
    engine: EngineConfig = EngineConfig()
    cache: CacheConfig | None = Field(
        None, description="the shared cache; null: each replica has its device pool alone"
    )
    router: RouterConfig = RouterConfig()
    dispatch: DispatchConfig = DispatchConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    serve: ServeConfig = ServeConfig()
    scaling: ScalingConfig = ScalingConfig()
    doctor: DoctorConfig = DoctorConfig()

    @field_validator("replicas", mode="before")
    @classmethod
    def _number_or_range(cls, value: object) -> object:
        if isinstance(value, (dict, ReplicaRange)):
            return ReplicaRange.model_validate(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                "must be an integer of at least 1, or a range such as {min: 1, max: 8}"
            )
        return value

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
        if self.engine.kind == "torch":
            return 1 if self.engine.is_cuda else 0
        return self.engine.tensor_parallel_size

    @property
    def replica_names(self) -> tuple[str, ...]:
        """The names of the replica actors that are there from the start."""
        return tuple(map(self.replica_name, range(self.min_replicas)))

    @property
    def min_replicas(self) -> int:
        """How many replicas are always there."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min

    @property
    def max_replicas(self) -> int:
        """How many replicas there are at most."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max

    def replica_name(self, index: int) -> str:
        """The name of that replica's actor."""
        return f"{self.name}-replica-{index}"

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
        return router_name(self.name, shard=0)


def load_config(path: str | Path) -> ClusterConfig:
    """The cluster that the YAML file describes; `ConfigError` names what is wrong, and the fix."""
    return read_settings(Path(path), ClusterConfig, "model: smollm2-135m")
