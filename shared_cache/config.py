"""Settings of the cache, checked when they are read: a wrong or unknown one never runs."""

from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field


class Settings(BaseModel):
    """Base of every settings section: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheConfig(Settings):
    """How one replica takes part in the shared cache.

    Sizes accept numbers of bytes or text such as `512MiB`.
    """

    store: str | None = Field(
        None,
        description="fsspec URL of the shared tier (file://, s3://...); null: none. All replicas "
        "must reach the same place: memory:// is one process's own and shares nothing",
    )
    store_options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments for fsspec's file system"
    )
    host_bytes: ByteSize = Field(
        ByteSize(1 << 30), gt=0, description="memory for the host tier of one replica"
    )
    staging_deadline_s: float = Field(
        2.0, ge=0, description="longest time a request waits for blocks from the shared tier"
    )
    store_timeout_s: float = Field(
        30.0,
        gt=0,
        description="longest time to open the store; reading or saving that takes longer counts as "
        "a fault, and the store is left alone until it answers",
    )
    save_queue_bytes: ByteSize = Field(
        ByteSize(256 << 20),
        ge=0,
        description="blocks waiting to be written, at most half of the host tier; more are dropped",
    )
    io_threads: int = Field(
        4, ge=1, le=64, description="threads that read the store; as many, but at most 4, write it"
    )
