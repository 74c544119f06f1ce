"""Blocks go on to the device while the rest of their prompt is still on its way from a tier.

What is promised to an engine is verified in host memory first, so a request is computed only when
all of its prefix is there. Without this the device would begin to load then, and the link to it
would have done nothing while the store was read.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from actors.engine import GenerationRequest, Preload
from shared_cache.prefix_cache import PrefixCache, StagedPrefix

logger = logging.getLogger(__name__)

PART_BYTES = 128 << 20
"""Blocks of so many bytes are loaded at a time: some milliseconds of the link."""

MAX_PARTS = 8
"""A longer prompt is loaded in larger parts, as each costs the engine's thread some work."""

END_PARTS = 4
"""Its end is loaded in shorter parts, so many for one: its request waits for the last of them."""

Staging = Callable[[int], Awaitable[StagedPrefix | None]]
"""Gives leased blocks, once those before a position have come, and perhaps more of them; None when
they do not come."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How the blocks from `start` to `end` of a prompt are loaded in parts."""

    start: int
    end: int
    block_bytes: int

    def next_end(self, position: int) -> int | None:
        """Where the part that begins at `position` ends, at the soonest.

        None: what is left goes with the request.
        """
        least = max(1, PART_BYTES // self.block_bytes)
        size = -(-(self.end - self.start) // MAX_PARTS)
        if self.end - position < 2 * size:
            size //= END_PARTS
        size = max(least, size)
        end = position + size
        return end if end < self.end else None


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

    def start(self, preload: Preload, parts: Parts, staging: Staging) -> None:
        """Bring `parts`, in order, as they come, each with all that has come by then."""
        self._task = asyncio.create_task(self._run(preload, parts, staging))

    def enough(self) -> None:
        """Begin no part any more: the request itself comes, and finds what is under way."""
        self._is_enough = True

    async def stop(self) -> None:
        """End it; what is not loaded yet is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, preload: Preload, parts: Parts, staging: Staging) -> None:
        position = parts.start
        try:
            while (end := parts.next_end(position)) is not None and not self._is_enough:
                part = await staging(end)
                if part is None:
                    return
                try:
                    if part.end < end or self._is_enough:
                        return
                    await self._load(preload, part.end)
                    position = part.end
                finally:
                    self._cache.release(part)
        except Exception as error:
            logger.warning("loading a prompt's first blocks ahead failed: %r", error)

    async def _load(self, preload: Preload, end: int) -> None:
        tokens, size = await preload(self._request, end), self._tokens_per_block
        if tokens:
            first = self.loaded.start if self.loaded else tokens.start // size
            self.loaded = range(first, tokens.stop // size)
