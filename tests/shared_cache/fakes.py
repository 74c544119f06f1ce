"""What the tests of staging and connector share: a namespace, a clock, a store to misbehave."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from shared_cache.config import CacheConfig
from shared_cache.hashing import BlockHash, BlockHashChain
from shared_cache.host.local import LocalHostTier
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.staging import SharedCache
from shared_cache.store import BlockRun, BlockStore, MemoryBlockStore

LAYOUT = BlockLayout(
    num_layers=1, kv_factor=1, num_kv_heads=1, tokens_per_block=4, head_dim=4, dtype="float32"
)
NAMESPACE = Namespace(model="m", revision="r", engine="fake", layout=LAYOUT)
BLOCK_BYTES = LAYOUT.block_bytes
WAIT_S = 10.0
"""How long a test waits for an event that must come."""


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def chain_of(num_blocks: int, first_token: int = 0) -> BlockHashChain:
    tokens = range(first_token, first_token + num_blocks * LAYOUT.tokens_per_block)
    return BlockHashChain(LAYOUT.tokens_per_block, tokens=tokens)


def payload_of(block_hash: BlockHash) -> bytes:
    return bytes(block_hash * (BLOCK_BYTES // len(block_hash)))


def run_of(chain: BlockHashChain) -> BlockRun:
    payloads = tuple(memoryview(payload_of(h)) for h in chain.hashes)
    return BlockRun(chain.parent_of(0), tuple(chain.hashes), payloads)


class ScriptedStore(MemoryBlockStore):
    """A memory store that counts, and that calls a hook before each operation.

    A hook may raise, wait, or return a number that replaces the operation's answer.
    """

    def __init__(self) -> None:
        super().__init__(NAMESPACE)
        self.on_match: Callable[[Sequence[BlockHash]], int | None] = lambda hashes: None
        self.on_read: Callable[[Sequence[BlockHash]], int | None] = lambda hashes: None
        self.on_write: Callable[[BlockRun], int | None] = lambda run: None
        self.num_matches = 0
        self.num_writes = 0
        self.num_reads: Counter[BlockHash] = Counter()
        self.is_closed = False
        self._count_lock = threading.Lock()

    def match(self, hashes: Sequence[BlockHash]) -> int:
        with self._count_lock:
            self.num_matches += 1
        answer = self.on_match(hashes)
        return super().match(hashes) if answer is None else answer

    def read_into(self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]) -> int:
        with self._count_lock:
            self.num_reads.update(hashes)
        answer = self.on_read(hashes)
        return super().read_into(hashes, buffers) if answer is None else answer

    def write(self, run: BlockRun) -> int:
        with self._count_lock:
            self.num_writes += 1
        answer = self.on_write(run)
        return super().write(run) if answer is None else answer

    def close(self) -> None:
        self.is_closed = True


class Gate:
    """A hook that holds its caller until `open`; `entered` tells that somebody is held."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def __call__(self, *_: object) -> None:
        self.entered.release()
        assert self._open.wait(WAIT_S)

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=WAIT_S)


def make_cache(
    store: BlockStore | None,
    num_slots: int = 64,
    clock: Callable[[], float] | None = None,
    **settings: object,
) -> SharedCache:
    defaults: dict[str, object] = {"staging_deadline_s": WAIT_S, "io_threads": 2}
    config = CacheConfig.model_validate(defaults | settings)
    host = LocalHostTier(num_slots * 4096, BLOCK_BYTES)
    return SharedCache(host, store, config, **({"clock": clock} if clock else {}))


def fill_host(cache: SharedCache, hashes: Sequence[BlockHash]) -> None:
    """Put these blocks into the host tier, unleased."""
    slots = cache.host.reserve(len(hashes))
    for slot, block_hash in zip(slots, hashes, strict=True):
        cache.host.buffer(slot)[:] = payload_of(block_hash)
    cache.host.release(cache.host.commit(slots, hashes))
