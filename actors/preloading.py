"""Blocks go on to the device while the rest of their prompt is still on its way from a tier.

What is promised to an engine is verified in host memory first, so a request is computed only when
all of its prefix is there. Without this the device would begin to load then, and the link to it
would have done nothing while the store was read.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from actors.engine import GenerationRequest, Preload, SamplingParams
from shared_cache.prefix_cache import PrefixCache, StagedPrefix

logger = logging.getLogger(__name__)

PART_BYTES = 160 << 20
"""Blocks of so many bytes are loaded at a time: some milliseconds of the link."""

MAX_PARTS = 8
"""A longer prompt is loaded in larger parts, as each costs the engine's thread some work."""

Staging = Callable[[int], Awaitable[StagedPrefix | None]]
"""Gives the leased blocks before a position, once they have come; None when they do not."""


def part_ends(start: int, end: int, block_bytes: int) -> list[int]:
    """Where the parts of blocks `start` to `end` end; the last part goes with its request."""
    size = max(1, PART_BYTES // block_bytes, -(-(end - start) // MAX_PARTS))
    return list(range(start + size, end, size))


class Preloading:
    """One prompt's blocks, part by part, in a task of its own. For one event loop.

    `loaded` are the blocks that it brought to the device so far. Nothing here raises for an engine
    or a store.
    """

    def __init__(
        self, cache: PrefixCache, request: GenerationRequest, tokens_per_block: int
    ) -> None:
        self.loaded = range(0)
        self._cache = cache
        self._request = request
        self._tokens_per_block = tokens_per_block
        self._is_enough = False
        self._task: asyncio.Task[None] | None = None

    def start(self, preload: Preload, ends: Sequence[int], staging: Staging) -> None:
        """Bring the blocks before each of `ends`, in order, as they come."""
        self._task = asyncio.create_task(self._run(preload, ends, staging))

    def enough(self) -> None:
        """Begin no part any more: the request itself comes, and finds what is under way."""
        self._is_enough = True

    async def stop(self) -> None:
        """End it; what is not loaded yet is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, preload: Preload, ends: Sequence[int], staging: Staging) -> None:
        try:
            for end in ends:
                part = None if self._is_enough else await staging(end)
                if part is None:
                    return
                try:
                    if part.end < end or self._is_enough:
                        return
                    await self._load(preload, end)
                finally:
                    self._cache.release(part)
        except Exception as error:
            logger.warning("loading a prompt's first blocks ahead failed: %r", error)

    async def _load(self, preload: Preload, end: int) -> None:
        num_tokens = end * self._tokens_per_block + 1
        part = GenerationRequest(
            f"{self._request.request_id}-ahead",
            self._request.prompt_token_ids[:num_tokens],
            SamplingParams(max_tokens=1),
            self._request.scope,
        )
        tokens, size = await preload(part), self._tokens_per_block
        if tokens:
            first = self.loaded.start if self.loaded else tokens.start // size
            self.loaded = range(first, tokens.stop // size)
