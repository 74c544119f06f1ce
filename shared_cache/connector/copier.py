"""Copies between host slots and a pool in the CPU's memory; and which copier a pool gets.

Each copy is finished before the call returns, so nothing that the engine does next can overtake it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from shared_cache.checksum import block_checksum
from shared_cache.connector.copies import (
    BlockCopier,
    BlockCopy,
    BlockLoad,
    BlockSave,
    OnDone,
    OnFailed,
    OnLoaded,
)
from shared_cache.connector.cuda_copier import CudaCopier
from shared_cache.parallel import run_all

BYTES_PER_PART = 8 << 20
"""Copied by one thread at a time: enough to be worth it, few enough to spread a turn's blocks."""

Copy = TypeVar("Copy")


def make_copier(pool: torch.Tensor) -> BlockCopier:
    """The copier for `pool`, `[num_blocks, block_bytes]` of uint8."""
    return CudaCopier(pool) if pool.is_cuda else CpuCopier(pool)


class CpuCopier:
    """Plain copies, some blocks a thread.

    Through numpy: torch's `copy_` spreads every single block over its threads, which is slower than
    one memcpy as soon as another thread computes.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._rows = pool.numpy()
        self._block_bytes = pool.shape[1]

    def load(self, loads: Sequence[BlockLoad], stream: Any) -> None:
        """See `BlockCopier.load`."""
        copies = [pair for load in loads for pair in load.pairs()]
        run_all([partial(self._load, part) for part in _parts(copies, self._block_bytes)])

    def load_beside(
        self, loads: Sequence[BlockLoad], stream: Any, on_done: OnLoaded | None = None
    ) -> Callable[[], bool]:
        """See `BlockCopier.load_beside`: done at once."""
        self.load(loads, stream)
        if on_done is not None:
            on_done()
        return lambda: True

    def before_writes(self, blocks: Collection[int] | None, stream: Any) -> None:
        """See `BlockCopier.before_writes`: no save is ever under way."""

    def save(
        self, copies: Sequence[BlockSave], stream: Any, on_done: OnDone, on_failed: OnFailed
    ) -> None:
        """See `BlockCopier.save`; checksums are made while a block is in the CPU's cache."""
        start_s = time.perf_counter()
        try:
            checksums = run_all(
                [partial(self._save, part) for part in _parts(copies, self._block_bytes)]
            )
        except Exception as error:  # whatever it is, nothing is written any more
            on_failed(error)
            return
        on_done(time.perf_counter() - start_s, [one for part in checksums for one in part])

    @property
    def prepare(self) -> Callable[[memoryview], None]:
        """See `BlockCopier.prepare`: memory is memory to a CPU."""
        return _leave_as_it_is

    def close(self) -> None:
        """See `BlockCopier.close`."""

    def _load(self, copies: Sequence[BlockCopy]) -> None:
        for buffer, block in copies:
            np.copyto(self._rows[block], np.frombuffer(buffer, np.uint8))

    def _save(self, copies: Sequence[BlockSave]) -> list[int]:
        checksums = []
        for buffer, block, name in copies:
            row = self._rows[block]
            np.copyto(np.frombuffer(buffer, np.uint8), row)
            checksums.append(block_checksum(name, memoryview(row)))
        return checksums


def _leave_as_it_is(memory: memoryview) -> None:
    """Nothing to prepare."""


def _parts(copies: Sequence[Copy], block_bytes: int) -> list[Sequence[Copy]]:
    step = max(1, BYTES_PER_PART // block_bytes)
    return [copies[start : start + step] for start in range(0, len(copies), step)]
