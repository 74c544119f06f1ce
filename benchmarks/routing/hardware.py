"""What a modelled replica can do; the defaults are an H100 with an 8B model in bf16, GQA."""

from dataclasses import dataclass

from actors.routing import Speeds

TOKENS_PER_BLOCK = 512
"""As in Mooncake's traces."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Speeds and sizes of one replica. A tier of 0 tokens is not there.

    `step_s` is a decode step without prefill, `chunk_s` one beside a prefill chunk; each active KV
    token adds `kv_read_s` to either. With `chunk_tokens` a step beside a prefill takes as long as
    one of its turns of so many tokens, which matters when most prefills are short. `store_tokens`
    is the store's size for each replica; a host tier of `host_tokens` is shared by
    `replicas_per_host` replicas.
    """

    prefill_base_s: float = 6e-3
    prefill_token_s: float = 32e-6
    prefill_pair_s: float = 1.31e-9
    step_s: float = 6.5e-3
    chunk_s: float = 65.5e-3
    kv_read_s: float = 52e-9
    chunk_tokens: int | None = None
    kv_token_bytes: int = 128 << 10
    device_tokens: int = 400_000
    host_tokens: int = 0
    host_bytes_s: float = 40e9
    store_tokens: int = 0
    store_bytes_s: float = 10e9
    store_total_bytes_s: float = float("inf")
    replicas_per_host: int = 1
    tokens_per_block: int = TOKENS_PER_BLOCK

    def private_blocks(self, num_tokens: int, num_blocks: int) -> int:
        """Blocks of `num_tokens` tokens besides the `num_blocks` full ones that have names."""
        return -(-(num_tokens - num_blocks * self.tokens_per_block) // self.tokens_per_block)

    def prefill_s(self, num_tokens: int, cached_tokens: int) -> float:
        """Seconds to compute `num_tokens` after `cached_tokens`, without decodes beside it."""
        pairs = num_tokens * (cached_tokens + num_tokens / 2)
        return self.prefill_base_s + self.prefill_token_s * num_tokens + self.prefill_pair_s * pairs

    def turn_s(self, num_tokens: int, work_s: float) -> float:
        """Seconds of a step beside a prefill of `num_tokens` that takes `work_s`."""
        if self.chunk_tokens is None:
            return self.chunk_s
        return work_s / max(1, -(-num_tokens // self.chunk_tokens))

    def host_load_s(self, num_tokens: int) -> float:
        """Seconds of the host link."""
        return num_tokens * self.kv_token_bytes / self.host_bytes_s

    def store_load_s(self, num_tokens: int) -> float:
        """Seconds of the replica's network."""
        return num_tokens * self.kv_token_bytes / self.store_bytes_s

    def speeds(self) -> Speeds:
        """What a router would know that has measured exactly."""
        return Speeds(
            prefill_base_s=self.prefill_base_s,
            prefill_token_s=self.prefill_token_s,
            prefill_pair_s=self.prefill_pair_s,
            host_token_s=self.host_load_s(1),
            store_token_s=self.store_load_s(1),
            decode_slowdown=self.kv_read_s / self.chunk_s,
        )
