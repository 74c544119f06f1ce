"""Settings of the router."""

from pydantic import Field

from actors.routing import PolicyName
from shared_cache.config import Settings
from shared_cache.errors import ConfigError


class RouterConfig(Settings):
    """How replicas are chosen."""

    policy: PolicyName = Field(
        "least_cost", description="least_cost: where the first token is predicted soonest"
    )
    doubt: float = Field(
        0.4, ge=0, description="mean prefills that each pending request of a replica counts extra"
    )
    price: float = Field(
        8.0, ge=0, description="what a second of prefill costs the others, times the queue squared"
    )
    memory_price: float = Field(
        0.8, ge=0, description="what KV memory of a replica that is nearly full costs the others"
    )
    session_affinity: float = Field(
        0.0,
        ge=0,
        description="mean prefills more that the replica with a session's last prompt may cost; a "
        "session is known by the first 256 tokens of its prompts. 0: caches decide alone",
    )
    reservation_timeout_s: float = Field(
        600.0, gt=0, description="a booking without a first token for so long is dropped"
    )
    stream_timeout_s: float = Field(
        21600.0, gt=0, description="a stream whose end nobody reports for so long is no load"
    )
    index_blocks: int = Field(
        1 << 22, ge=1, description="blocks that the router knows at most, about 80 bytes each"
    )
    index_ttl_s: float = Field(
        3600.0, gt=0, description="what is not asked for or told of for so long may be forgotten"
    )
    routing_block_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in steps of which prefixes are known, a multiple of tokens_per_block "
        "(the default); 64 makes decisions several times cheaper",
    )
    events_period_s: float = Field(
        0.25, gt=0, description="how often engines and machines are asked what their caches hold"
    )
    fallback_after_s: float = Field(
        0.1,
        gt=0,
        description="an ingress that has no answer after so long chooses by its own requests alone",
    )

    def stride(self, tokens_per_block: int) -> int:
        """The step in blocks; raises `ConfigError` if `routing_block_tokens` does not fit."""
        stride, rest = divmod(self.routing_block_tokens or tokens_per_block, tokens_per_block)
        if rest or not stride:
            raise ConfigError(
                f"router.routing_block_tokens ({self.routing_block_tokens}) must be a multiple of "
                f"tokens_per_block ({tokens_per_block})"
            )
        return stride
