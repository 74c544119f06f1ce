"""One YAML describes a cluster; whatever is wrong in it is said before anything starts.

It prevents the misspelt option that is dropped in silence: an unknown key, a key given twice or a
value of the wrong type is an error that names the file, the key's path and what is allowed there.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from actors.config import EngineConfig, ModelSource, ReplicaConfig
from actors.dispatch import DispatchConfig
from actors.router import RouterConfig
from shared_cache.config import DEFAULT_ARENA, CacheConfig, Settings
from shared_cache.errors import ConfigError


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
    num_gpus_per_replica: float = Field(0, ge=0, description="GPUs that Ray reserves for each")
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
        if cache is None:
            return cache
        tiers = tuple(
            tier.model_copy(update={"url": _shareable_url(tier.url)}) for tier in cache.tiers
        )
        store = None if cache.store is None else _shareable_url(cache.store)
        return cache.model_copy(update={"store": store, "tiers": tiers})

    @model_validator(mode="after")
    def _replicas_are_valid(self) -> "ClusterConfig":
        placeholder = ModelSource(name=self.model, path="", revision="")
        ReplicaConfig(name="check", model=placeholder, engine=self.engine, cache=self.cache)
        return self

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


def _shareable_url(url: str) -> str:
    """`url` expanded; raises `ValueError` for one that each replica would have for itself."""
    expanded = expand_store_url(url)
    if "memory" in re.split("::|://", expanded)[:-1]:
        raise ValueError(
            f"{expanded} is memory of each process alone, so the replicas would share nothing; "
            "take file:// and a folder, or set store to null for no shared tier"
        )
    return expanded


def expand_store_url(url: str) -> str:
    """`url` with `$VAR`, `${VAR}` and `~` replaced, and a local path made absolute.

    The only place where paths of stores are expanded. Raises `ValueError` for a variable that is
    not set, or empty, and for a URL that names no place: it would become the working directory.
    """
    expanded = re.sub(r"\$(?:\{([^}]*)\}|(\w+))", lambda found: _variable(found, url), url)
    scheme, separator, path = expanded.strip().rpartition("://")
    if not path:
        raise ValueError(
            f"{url!r} names no place; give a folder (file:///data/kvcommons) or a bucket "
            "(s3://bucket/kvcommons), or null for no shared tier"
        )
    if separator and scheme != "file":
        return expanded.strip()
    return "file://" + os.path.abspath(os.path.expanduser(path))


def _variable(found: re.Match[str], url: str) -> str:
    name = found[1] or found[2]
    value = os.environ.get(name) if name else None
    if not value:
        state = "not set" if value is None else "empty"
        raise ValueError(f"the environment variable {name} in {url!r} is {state}; set it")
    return value


def load_config(path: str | Path) -> ClusterConfig:
    """The cluster that the YAML file describes; `ConfigError` names what is wrong, and the fix."""
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(_missing_file(path, error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings such as `model: smollm2-135m`")
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(one)}" for one in error.errors())
        raise ConfigError(f"{path}:\n{problems}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings may not give a key twice, where plain YAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _missing_file(path: Path, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{path} cannot be read: {error.strerror}"
    beside = sorted(one.name for one in path.parent.glob("*.yaml"))
    hint = f"; beside it are {', '.join(beside)}" if beside else ""
    return f"there is no file {path}{hint}"


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: the key's path, what is wrong, what is allowed."""
    location = [str(part) for part in error["loc"]]
    where = ".".join(location) or "the settings together"
    if error["type"] != "extra_forbidden":
        given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
        text = str(error["msg"]).removeprefix("Value error, ")
        return f"{where}: {text}{given if len(given) < 100 else ''}"
    allowed = _allowed(location[:-1])
    close = difflib.get_close_matches(location[-1], allowed, n=1)
    guess = f"; did you mean `{close[0]}`?" if close else ";"
    return f"{where}: no such setting{guess} allowed here: {', '.join(allowed)}"


def _allowed(location: list[str]) -> list[str]:
    """The names of the settings in the section at `location`."""
    section: type[BaseModel] = ClusterConfig
    for part in location:
        if part.isdigit():  # a place in a list
            continue
        annotation = section.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)
