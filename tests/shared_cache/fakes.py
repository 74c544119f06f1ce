"""What the tests of staging and connector share: a namespace, a clock, a store to misbehave."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from shared_cache.config import CacheConfig
from shared_cache.eviction import make_policy
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, BlockHashChain, ReuseScope
from shared_cache.host.interface import HostTier, NewRun
from shared_cache.host.local import LocalHostTier
from shared_cache.host.terms import IndexRules, StoreAdmission
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.staging import SharedCache
from shared_cache.stores.store import BlockRun, BlockStore, MemoryBlockStore

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


def chain_of(
    num_blocks: int, first_token: int = 0, scope: ReuseScope = DEFAULT_SCOPE
) -> BlockHashChain:
    tokens = range(first_token, first_token + num_blocks * LAYOUT.tokens_per_block)
    return BlockHashChain(LAYOUT.tokens_per_block, scope, tokens)


def payload_of(block_hash: BlockHash) -> bytes:
    return bytes(block_hash * (BLOCK_BYTES // len(block_hash)))


def run_of(chain: BlockHashChain) -> BlockRun:
    payloads = tuple(memoryview(payload_of(h)) for h in chain.hashes)
    return BlockRun(chain.parent_of(0), tuple(chain.hashes), payloads)


class ScriptedStore(MemoryBlockStore):
    """A memory store that counts, and that calls a hook before each operation.

    A hook may raise, wait, or (but for reads) return a number that replaces the answer.
    """

    def __init__(self) -> None:
        super().__init__(NAMESPACE)
        self.on_match: Callable[[Sequence[BlockHash]], int | None] = lambda hashes: None
        self.on_read: Callable[[Sequence[BlockHash]], None] = lambda hashes: None
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

    def read_into(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        with self._count_lock:
            self.num_reads.update(hashes)
        self.on_read(hashes)
        return super().read_into(hashes, buffers)

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


def make_host(num_slots: int = 64, admission: StoreAdmission = "always") -> LocalHostTier:
    rules = IndexRules(lambda clock: make_policy("lru", clock), {}, admission)
    return LocalHostTier(num_slots * 4096, BLOCK_BYTES, rules)


def make_cache(
    *stores: BlockStore | None,
    num_slots: int = 64,
    host_tier: HostTier | None = None,
    clock: Callable[[], float] | None = None,
    tier: dict[str, object] | None = None,
    **settings: object,
) -> SharedCache:
    """A cache over these stores, nearest first; `tier` has the settings of each of them."""
    given = [store for store in stores if store is not None]
    defaults: dict[str, object] = {
        "staging_deadline_s": WAIT_S,
        "io_threads": 2,
        "cost": {"gate": False},
        "tiers": [{"url": f"memory://{index}", **(tier or {})} for index in range(len(given))],
    }
    config = CacheConfig.model_validate(defaults | settings)
    host_tier = host_tier or make_host(num_slots, "always" if given else "never")
    return SharedCache(host_tier, given, config, **({"clock": clock} if clock else {}))


def fill_host(cache: SharedCache, hashes: Sequence[BlockHash]) -> None:
    """Put these blocks into the host tier, unleased; the shared tier is said to have them."""
    slots = cache.host.reserve(len(hashes))
    for slot, block_hash in zip(slots, hashes, strict=True):
        cache.host.buffer(slot)[:] = payload_of(block_hash)
    run = NewRun(DEFAULT_SCOPE.root_hash(), tuple(hashes), is_stored=True)
    cache.host.release(cache.host.commit(slots, run))


def num_in_host(cache: SharedCache, hashes: Sequence[BlockHash]) -> int:
    """How many leading blocks of `hashes` are in the host tier."""
    lease = cache.host.lease_held(hashes)
    cache.host.release(lease)
    return len(lease.slots)


def save_blocks(
    cache: SharedCache, chain: BlockHashChain, start: int, stop: int, tenant: bytes = b""
) -> None:
    """What the connector's worker does after a forward pass."""
    hashes = chain.hashes[start:stop]
    slots = cache.reserve(len(hashes))
    for slot, block_hash in zip(slots, hashes, strict=False):
        cache.host.buffer(slot)[:] = payload_of(block_hash)
    if slots:
        run = NewRun(chain.parent_of(start), tuple(hashes[: len(slots)]), tenant)
        cache.save(slots, run, start)


def await_published(cache: SharedCache) -> None:
    """Wait until what was saved is in the host tier, whatever becomes of it behind that."""
    assert cache._publisher.await_published(WAIT_S)
