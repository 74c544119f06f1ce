"""An engine that computes nothing: what is left is the cost of the way to it and back."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from actors.config import ReplicaConfig
from actors.engine import (
    CacheChanges,
    EngineStats,
    GenerationRequest,
    KvCacheStats,
    Receipt,
    TokenChunk,
)
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.namespace import BlockLayout, Namespace

GROUP = 8
"""Tokens in a chunk: an engine with drafts, or a turn in which the reader was not asked."""


class InstantEngine:
    """Says ` word` for each token, as soon as it is asked; implements `actors.engine.Engine`."""

    preload = None

    def __init__(self, config: ReplicaConfig) -> None:
        block = config.engine.kv_cache_config.tokens_per_block
        self.namespace = Namespace(
            "instant", "0", "torch", BlockLayout(1, 2, 1, block, 2, "float32")
        )
        self.cache = None
        self.max_total_tokens = 1 << 20
        self._block = block
        self._is_closed = False
        self._num_running = self._num_turns = self._num_generated = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """All tokens, in chunks; the event loop gets its turn between them."""
        left = request.sampling.max_tokens - request.num_output_so_far
        num_prompt = len(request.prompt_token_ids)
        receipt: Receipt | None = Receipt(num_prompt, 0, 0, 0, num_prompt)
        self._num_running += 1
        try:
            while left:
                size = 1 if receipt is not None else min(GROUP, left)
                left -= size
                self._num_turns += 1
                self._num_generated += size
                finish = None if left else "length"
                yield TokenChunk((5,) * size, " word" * size, 0, finish, receipt)  # type: ignore[arg-type]
                receipt = None
                await asyncio.sleep(0)
        finally:
            self._num_running -= 1

    def storage_scope(self, scope: ReuseScope) -> ReuseScope:
        """See `Engine.storage_scope`."""
        return scope

    def num_device_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """See `Engine.num_device_blocks`."""
        return 0

    def take_cache_changes(self) -> CacheChanges:
        """See `Engine.take_cache_changes`."""
        return CacheChanges()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        blocks = KvCacheStats(64, 64, 0, self._block, 0, 0, 0, 0)
        return EngineStats(
            blocks, 0, self._num_running, 0, self._num_generated, 0, 0, self._num_turns
        )

    def is_alive(self) -> bool:
        """See `Engine.is_alive`."""
        return not self._is_closed

    def close(self) -> None:
        """See `Engine.close`."""
        self._is_closed = True


def build_instant_engine(config: ReplicaConfig) -> InstantEngine:
    """For `application(..., build=build_instant_engine)`."""
    return InstantEngine(config)
