"""Settings of the cache, checked when they are read: a wrong or unknown one never runs."""

from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

DEFAULT_ARENA = "default"


class Settings(BaseModel):
    """Base of every settings section: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ARENA_SETTINGS = (
    "name",
    "folder",
    "start_owner",
    "reserve_ahead",
    "populate",
    "reader_threads",
)
"""Fields of `HostConfig` that mean nothing to memory of one process."""


class HostConfig(Settings):
    """The host tier: blocks in this node's memory."""

    bytes: ByteSize = Field(
        ByteSize(1 << 30),
        gt=0,
        description="memory for blocks: of the whole node, or, with "
        "scope: process, of each replica",
    )
    scope: Literal["node", "process"] = Field(
        "node",
        description="node: one arena that all processes of a node share; process: each its own",
    )
    name: str = Field(
        DEFAULT_ARENA,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="name of the node's arena; processes with the same name and folder share it; "
        "in a cluster `default` stands for the cluster's name",
    )
    folder: str | None = Field(
        None,
        description="folder on a memory file system for the arena and its socket; default: "
        "kvcommons-<user id> in /dev/shm, or in the folder for temporary files where there is none",
    )
    start_owner: bool = Field(
        True,
        description="start the arena's owner as a background process if none runs; a cluster "
        "in Ray starts it as an actor instead",
    )
    eviction: Literal["lru", "s3fifo", "priority"] = Field(
        "lru", description="which blocks go first when memory is full"
    )
    quotas: dict[str, ByteSize] = Field(
        default_factory=dict, description="most memory for the blocks of one cache salt"
    )
    verify_every_load: bool = Field(
        False,
        description="check a block's checksum again whenever it is leased, not only when it "
        "enters the memory",
    )
    reserve_ahead: int | None = Field(
        None,
        ge=1,
        description="slots that a process keeps reserved for new blocks, so that saving waits for "
        "nothing; default: what two turns of the engine fill, or 64; at most an eighth of the "
        "memory",
    )

    populate: bool = Field(
        False,
        description="take all the memory at start, and pin it for a GPU, instead of as it is first "
        "used: starting takes longer, and no load or save is ever slowed down by that",
    )

    reader_threads: int | None = Field(
        None,
        ge=0,
        le=64,
        description="threads of a process beside each replica that reads a local tier's blocks "
        "from the page cache, so that the engine's process need not; 0: none is started; default: "
        "three for four cores, at most 16, where there are at least 8",
    )

    @model_validator(mode="after")
    def _only_an_arena_has_these(self) -> "HostConfig":
        given = [
            name
            for name in ARENA_SETTINGS
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.scope == "process" and given:
            raise ValueError(
                f"scope: process has no arena, so it cannot heed {', '.join(given)}: remove that, "
                "or write scope: node"
            )
        return self


class TierConfig(Settings):
    """One tier behind host memory: a node-local disk, or the shared tier."""

    url: str = Field(description="fsspec URL (file://, s3://...)")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments for fsspec's file system; s3://, gs:// and az:// are read "
        "with obstore if it is installed, which is told the same (`client: fsspec`: never)",
    )
    timeout_s: float = Field(
        30.0,
        gt=0,
        description="longest time to open it; reading or saving that takes longer counts as a "
        "fault, and the tier is left alone until it answers",
    )
    admission: Literal["always", "second_use", "worth", "never"] = Field(
        "always",
        description="which blocks are written to it: all, those used a second time (of a tier "
        "before the last one: those that a later tier was asked for), those whose computing costs "
        "more than their loading, none (read-only)",
    )
    codec: Literal["none", "shuffle-zstd", "auto"] = Field(
        "none",
        description="shuffle-zstd makes blocks about a third smaller, for links below 0.6 GB/s; "
        "auto: while the tier is measured to take less than that",
    )
    max_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="budget: least recently used blocks beyond it are deleted (object stores note "
        "no reads: those written first)",
    )
    max_age_s: float | None = Field(
        None,
        gt=0,
        description="blocks that were not used for so long are deleted (object stores note no "
        "reads: those written so long ago, in use or not)",
    )
    quotas: dict[str, ByteSize] = Field(
        default_factory=dict,
        description="most bytes for the blocks of one cache salt, and of all that add to it; "
        "beyond that the least recently used of them are deleted",
    )


class CostConfig(Settings):
    """When loading is worth it, and how much of a turn copies may take."""

    gate: bool = Field(
        True, description="load only what is predicted to arrive sooner than it is computed"
    )
    max_save_share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="part of a turn's time that copies of new blocks may take "
        "while requests decode; the rest waits for the next turn",
    )
    max_fetch_bytes_per_s: ByteSize | None = Field(
        None,
        gt=0,
        description="bandwidth for reading from the tiers behind host memory, always: also while "
        "nothing decodes. Reads beyond it wait their turn, and what would arrive too late for that "
        "is computed; null: no limit",
    )


class CacheConfig(Settings):
    """How one replica takes part in the shared cache.

    Sizes accept numbers of bytes or text such as `512MiB`.
    """

    store: str | None = Field(
        None,
        description="short for `tiers: [{url: ...}]`: fsspec URL of the shared tier; null: none",
    )
    tiers: tuple[TierConfig, ...] = Field(
        (),
        description="tiers behind host memory, nearest first; the last one is the shared tier. All "
        "replicas must reach the same place: memory:// is one process's own and shares nothing",
    )
    host: HostConfig = HostConfig()
    cost: CostConfig = CostConfig()
    staging_deadline_s: float = Field(
        2.0, ge=0, description="longest time a request waits for blocks from the tiers"
    )
    save_queue_bytes: ByteSize = Field(
        ByteSize(256 << 20),
        ge=0,
        description="blocks waiting to be written, at most half of the host tier; more are dropped",
    )
    io_threads: int = Field(
        4, ge=1, le=64, description="threads that read the tiers; as many, but at most 4, write"
    )

    @model_validator(mode="after")
    def _one_way_to_name_tiers(self) -> "CacheConfig":
        if self.store is not None and self.tiers:
            raise ValueError("`store` is short for one tier: give `store` or `tiers`, not both")
        return self

    @property
    def all_tiers(self) -> tuple[TierConfig, ...]:
        """`tiers`, or the one that `store` stands for."""
        return self.tiers if self.store is None else (TierConfig(url=self.store),)

    def with_reserve_ahead(self, num_slots: int) -> "CacheConfig":
        """These settings with so many slots reserved ahead, unless they say themselves how many."""
        if self.host.reserve_ahead is not None:
            return self
        host = self.host.model_copy(update={"reserve_ahead": num_slots})
        return self.model_copy(update={"host": host})

    def store_admission(
        self, *, is_read_only: bool = False
    ) -> Literal["always", "second_use", "never"]:
        """Which blocks the host tier names for the shared tier: none where nobody writes them.

        `is_read_only`: the shared tier was found to be so. What blocks are worth shows later.
        """
        if not self.all_tiers or is_read_only:
            return "never"
        admission = self.all_tiers[-1].admission
        return "always" if admission == "worth" else admission
