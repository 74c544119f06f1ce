"""Thousands of random loads, saves and evictions through the worker, every byte compared.

On a CPU some steps in each run of the tests; on a GPU thousands, with copies that nobody waits for:
a block is overwritten in the turn after it was saved, and loaded into right after it was read.
"""

import random
from array import array
from typing import Any

import numpy as np
import pytest
import torch

from shared_cache.config import CacheConfig
from shared_cache.connector.transfers import Load, SaveRun, TransferPlan, pack_loads
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.hashing import BlockHash, BlockHashChain, ReuseScope
from shared_cache.host.local import LocalHostTier
from shared_cache.staging import SharedCache

BLOCK_BYTES = 64 << 10
NUM_HOST_SLOTS = 24
NUM_DEVICE_BLOCKS = 16
ROOT = ReuseScope().root_hash()
NAMES = [BlockHashChain(1, tokens=[token]).hashes[0] for token in range(60)]

with_gpu = pytest.param(
    "cuda",
    5000,
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def pattern(name: BlockHash) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(name * (BLOCK_BYTES // len(name)), np.uint8).copy())


class Soak:
    """A pool whose blocks hold the pattern of a name, and the worker that moves them."""

    def __init__(self, device: str, is_told_of_writes: bool, seed: int) -> None:
        self._rng = random.Random(seed)
        self._told = is_told_of_writes
        tier = LocalHostTier(NUM_HOST_SLOTS * BLOCK_BYTES, BLOCK_BYTES)
        self.cache = SharedCache(tier, (), CacheConfig())
        self._pool = torch.zeros((NUM_DEVICE_BLOCKS, BLOCK_BYTES), dtype=torch.uint8, device=device)
        self._patterns = torch.stack([pattern(name) for name in NAMES]).to(device)
        self._content: list[int | None] = [None] * NUM_DEVICE_BLOCKS
        self._stream: Any = torch.cuda.current_stream() if self._pool.is_cuda else None
        self.worker = SharedCacheWorker(self.cache, is_told_of_writes=is_told_of_writes)
        self.worker.register_kv_caches(self._pool)
        self.num_loaded = self.num_saved = 0

    def turn(self) -> None:
        """Load some blocks and check them, write others, save those."""
        blocks = self._rng.sample(range(NUM_DEVICE_BLOCKS), 6)
        to_load, to_write = blocks[:3], blocks[3:]
        names = self._rng.sample(range(len(NAMES)), 6)
        staged = [(self.cache.stage([NAMES[n]]), n) for n in names[:3]]
        loads = [
            (one, name, block)
            for (one, name), block in zip(staged, to_load, strict=True)
            if one.num_blocks
        ]
        packed = pack_loads([Load(self.cache.places(one), [block]) for one, _, block in loads])
        saves = tuple(
            SaveRun(ROOT, NAMES[name], array("I", [block]).tobytes())
            for name, block in zip(names[3:], to_write, strict=True)
        )
        self.worker.bind_connector_meta(TransferPlan(packed, saves))
        if self._told:
            self.worker.before_writes(blocks, self._stream)
        self.worker.start_load_kv(self._stream)
        for name, block in zip(names[3:], to_write, strict=True):
            self._pool[block].copy_(self._patterns[name], non_blocking=True)
            self._content[block] = name
        for _, name, block in loads:
            self._content[block] = name
        self._check()
        self.worker.wait_for_save(self._stream)
        self.num_saved += len(saves)
        self.num_loaded += len(loads)
        for one, _ in staged:
            self.cache.release(one)

    def _check(self) -> None:
        """Every block of the device that was ever written holds its pattern."""
        known = [block for block, name in enumerate(self._content) if name is not None]
        expected = self._patterns[[self._content[block] for block in known]]
        assert torch.equal(self._pool[known], expected)

    def close(self) -> None:
        self.worker.close()
        self.cache.close()


@pytest.mark.parametrize("is_told_of_writes", [False, True])
@pytest.mark.parametrize(("device", "num_turns"), [("cpu", 150), with_gpu])
def test_no_byte_is_ever_wrong(device: str, num_turns: int, is_told_of_writes: bool) -> None:
    soak = Soak(device, is_told_of_writes, seed=7)
    try:
        for _ in range(num_turns):
            soak.turn()
        assert soak.worker.connector_faults == 0
        assert soak.num_loaded > num_turns / 2
        assert soak.cache.host.stats().evicted_blocks > num_turns / 2
    finally:
        soak.close()
