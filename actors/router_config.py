"""Settings of the router."""

from typing import Literal

from pydantic import Field

from shared_cache.config import Settings


class RouterConfig(Settings):
    """How replicas are chosen."""

    policy: Literal["prefix", "round_robin", "random", "least_outstanding"] = Field(
        "prefix", description="prefix: longest known prefix corrected by load"
    )
    fetch_cost: float = Field(
        0.1, ge=0, le=1, description="work of a token from the shared tier; computing it is 1"
    )
    outstanding_cost: float = Field(
        32.0, ge=0, description="work, in tokens, that each running request of a replica counts"
    )
    reservation_timeout_s: float = Field(
        600.0, gt=0, description="a booking without a first token for so long is dropped"
    )
    stream_timeout_s: float = Field(
        21600.0, gt=0, description="a stream whose end nobody reports for so long is no load"
    )
    shared_index_blocks: int = Field(
        1 << 20, ge=1, description="blocks that the router remembers of the shared tier"
    )
