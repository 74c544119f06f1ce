"""Settings of the connector inside TensorRT-LLM: one YAML file, named by one variable.

TensorRT-LLM refuses settings that it does not know, so ours cannot stand in its own configuration.
And it starts its processes with an environment that holds, of what was set late, only variables
whose names begin with `TLLM` or `TRTLLM`: under any other name the file would be found on one rank
and not on the next.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from shared_cache.config import CacheConfig, Settings, TierConfig
from shared_cache.errors import ConfigError
from shared_cache.settings_file import read_settings, shareable_url

CONFIG_VARIABLE = "TLLM_SHARED_CACHE_CONFIG"
"""The environment variable that names the YAML file."""


class KvLayoutConfig(Settings):
    """The engine's KV cache, for models whose config.json does not tell."""

    num_layers: int | None = Field(None, ge=1, description="layers with a KV cache")
    kv_factor: Literal[1, 2] | None = Field(
        None, description="2: keys and values; 1: one vector for both (MLA)"
    )
    num_kv_heads: int | None = Field(
        None, ge=1, description="KV heads of the whole model, before they are split among GPUs"
    )
    head_dim: int | None = Field(None, ge=1, description="elements of one head")
    dtype: Literal["float32", "float16", "bfloat16", "float8_e4m3fn"] | None = Field(
        None, description="element type of the KV cache"
    )


class ConnectorConfig(CacheConfig):
    """How a TensorRT-LLM engine takes part in the shared cache, without Ray.

    All settings of `cache` in a cluster, and those below. The smallest file is one line,
    `store: file:///path`; `host.bytes` is then a quarter of the machine's memory, at most half of
    what the memory file system holds, and `save_queue_bytes` a quarter of that.
    """

    match_wait_s: float = Field(
        0.05,
        ge=0,
        le=10,
        description="longest time that looking up prompts may wait for blocks from the tiers in "
        "one engine step, all its new requests together; the engine waits with it, all its "
        "requests and ranks. 0: what host memory holds alone counts",
    )
    staged_ahead: bool = Field(
        False,
        description="a replica in this very process has every prompt staged before the engine sees "
        "it; looking up then asks nobody",
    )
    model: str | None = Field(
        None,
        description="name of the model in the cache; default: its architecture, from config.json",
    )
    revision: str | None = Field(
        None,
        description="what identifies the weights; default: a digest of all of them, which is read "
        "once and remembered. Two engines share blocks only where it is equal, so whoever sets it "
        "vouches for that",
    )
    kv_layout: KvLayoutConfig | None = Field(
        None, description="corrections of what is read in the model's config.json"
    )
    trust_lora_ids: bool = Field(
        False,
        description="one LoRA id means the same adapter in every engine that uses this store; "
        "without that promise engines with LoRA are refused",
    )
    stats_period_s: float = Field(
        60.0, ge=0, description="how often a line in the log says what the cache did; 0: never"
    )
    log_level: Literal["debug", "info", "warning"] = Field(
        "info", description="lines that are shown where the program sets up no logging of its own"
    )

    @field_validator("store")
    @classmethod
    def _expand_store(cls, url: str | None) -> str | None:
        return None if url is None else shareable_url(url)

    @field_validator("tiers")
    @classmethod
    def _expand_tiers(cls, tiers: tuple[TierConfig, ...]) -> tuple[TierConfig, ...]:
        return tuple(tier.model_copy(update={"url": shareable_url(tier.url)}) for tier in tiers)


def read_connector_config(environment: Mapping[str, str]) -> tuple[Path, ConnectorConfig]:
    """The file that the environment names, and what it says; `ConfigError` tells the fix."""
    named = environment.get(CONFIG_VARIABLE)
    if not named:
        raise ConfigError(
            f"{CONFIG_VARIABLE} is not set: write a YAML file, its smallest form is the line "
            "`store: file:///path/that/all/engines/reach`, and set the variable to its path in the "
            "environment that starts TensorRT-LLM (it must be set before `LLM(...)`)"
        )
    path = Path(named).expanduser()
    if not path.is_absolute():
        raise ConfigError(
            f"{CONFIG_VARIABLE}={named} is a relative path, and the ranks of an engine need not "
            f"share a working directory: give the whole one, such as {path.absolute()}"
        )
    return path, read_settings(path, ConnectorConfig, "store: file:///data/kvcommons")
