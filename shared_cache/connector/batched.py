"""Many copies between host and device in few calls of the driver.

One call a block costs the engine's thread some twenty microseconds each: a prefix of a thousand
blocks would hold up every running request for several decoding steps, only to say what to copy.
`cuda.bindings` comes with torch; where it or the driver is too old, each block is a call.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

try:
    from cuda.bindings import runtime
except ImportError:
    runtime = None

COPIES_AT_ONCE = 64
"""The device begins with the first of them while the others are still being handed over."""

MemoryCopy = tuple[int, int, int]
"""Address to copy to, address to copy from, bytes; each in pinned host or in device memory."""


class BatchedCopies:
    """The driver's call for many copies, as long as it works."""

    def __init__(self) -> None:
        self._is_there = runtime is not None and hasattr(runtime, "cudaMemcpyBatchAsync")
        self._attributes: Any = None
        if self._is_there:
            self._attributes = runtime.cudaMemcpyAttributes()
            order = runtime.cudaMemcpySrcAccessOrder
            self._attributes.srcAccessOrder = order.cudaMemcpySrcAccessOrderStream

    def enqueue(self, copies: Sequence[MemoryCopy], stream: torch.cuda.Stream) -> bool:
        """Enqueue these copies on `stream`, in any order; False when the driver has no such call.

        Returns before they are done. When it is False, all are to be made in another way.
        """
        batches = range(0, len(copies), COPIES_AT_ONCE)
        return all(self._enqueue(copies[i : i + COPIES_AT_ONCE], stream) for i in batches)

    def _enqueue(self, copies: Sequence[MemoryCopy], stream: torch.cuda.Stream) -> bool:
        if not self._is_there:
            return False
        to, sources, sizes = zip(*copies, strict=True)
        try:
            result = runtime.cudaMemcpyBatchAsync(
                to, sources, sizes, len(to), [self._attributes], [0], 1, stream.cuda_stream
            )
            problem = None if int(result[0]) == 0 else str(result[0])
        except (TypeError, RuntimeError) as error:  # another version's signature, or no such symbol
            problem = str(error)
        if problem is not None:
            logger.warning("the driver copies no batches (%s): each block is copied alone", problem)
            self._is_there = False
        return self._is_there
