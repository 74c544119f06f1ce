"""Stand-ins that behave: an engine with a known output, a cache that counts its leases.

`FakeEngine` says the bytes of a fixed text, one token per byte, so that characters of several
bytes span tokens and text has to be held back, as with a real tokeniser.
"""

import asyncio
import codecs
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from actors.config import ReplicaConfig
from actors.engine import (
    CacheChanges,
    EngineStats,
    GenerationRequest,
    KvCacheStats,
    Preload,
    Receipt,
    TokenChunk,
)
from shared_cache.cache_stats import CacheStats
from shared_cache.errors import RequestError
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope, block_hashes
from shared_cache.host.interface import HostLease, HostStats
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.staging import StagedPrefix

FAKE_TEXT = "Grüße, 日本 🙂! " * 20
TOKENS_PER_BLOCK = 4
NUM_TOLD_BLOCKS = 10
LAYOUT = BlockLayout(1, 2, 1, TOKENS_PER_BLOCK, 2, "float32")
NAMESPACE = Namespace("fake", "0", "fake", LAYOUT)


def decode(data: bytes) -> str:
    """The whole characters at the beginning of `data`."""
    return codecs.getincrementaldecoder("utf-8")().decode(data)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many last characters of `text` might be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


class FakeEngine:
    """Says `FAKE_TEXT` whatever the prompt; checks that a continued request brings its beginning.

    `group` tokens come in one chunk, `turn_s` apart. `receipt` fixes what the first chunk says,
    and `num_on_device` how many leading blocks of any prompt the device has.
    A prompt that begins with `deadly_token` ends the engine's loop, once.
    """

    def __init__(
        self,
        group: int = 1,
        turn_s: float = 0.0,
        cache: Any = None,
        receipt: tuple[int, int] = (0, 0),
        max_total_tokens: int = 4096,
        deadly_token: int | None = None,
    ) -> None:
        self.namespace = NAMESPACE
        self.cache = cache
        self.max_total_tokens = max_total_tokens
        self.group = group
        self.turn_s = turn_s
        self.receipt = receipt
        self.deadly_token = deadly_token
        self.num_on_device = 0
        self.changes = CacheChanges()
        self.fail_with: Exception | None = None
        self.preload: Preload | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[GenerationRequest] = []
        self.num_aborted = 0
        self.num_turns = 0
        self.num_running = 0
        self.closed = False
        self.loop_died = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        sampling = request.sampling
        total = len(request.prompt_token_ids) + sampling.max_tokens - request.num_output_so_far
        if total > self.max_total_tokens:
            raise RequestError(f"{total} tokens do not fit; the limit is {self.max_total_tokens}")
        self.requests.append(request)
        if request.prompt_token_ids[0] == self.deadly_token:
            self.loop_died = True
            raise RuntimeError("the step loop has ended")
        self.num_running += 1
        has_ended = False
        try:
            for chunk in self._chunks(request):
                await asyncio.sleep(self.turn_s)
                await self.gate.wait()
                if self.fail_with is not None:
                    raise self.fail_with
                self.num_turns += 1
                has_ended = chunk.finish_reason is not None
                yield chunk
        finally:
            self.num_running -= 1
            self.num_aborted += not has_ended

    def _chunks(self, request: GenerationRequest) -> list[TokenChunk]:
        said = FAKE_TEXT.encode()
        so_far, limit = request.num_output_so_far, request.sampling.max_tokens
        brought = bytes(request.prompt_token_ids[len(request.prompt_token_ids) - so_far :])
        assert brought == said[:so_far], "the continued request does not bring what was said"
        chunks: list[TokenChunk] = []
        num_sent = self._num_certain(said[:so_far], request.sampling.stop)
        for start in range(so_far, limit, self.group):
            tokens = said[start : min(start + self.group, limit)]
            text = decode(said[: start + len(tokens)])
            cut = min((text.find(s) for s in request.sampling.stop if s in text), default=None)
            is_last = cut is not None or start + len(tokens) == limit
            certain = len(text) if cut is None else cut
            if not is_last:
                certain = self._num_certain(said[: start + len(tokens)], request.sampling.stop)
            finish = ("stop" if cut is not None else "length") if is_last else None
            receipt = self._receipt(len(request.prompt_token_ids)) if not chunks else None
            chunks.append(
                TokenChunk(tuple(tokens), text[num_sent:certain], len(tokens) - 1, finish, receipt)
            )
            num_sent = certain
            if is_last:
                break
        return chunks

    def _num_certain(self, said: bytes, stops: Sequence[str]) -> int:
        """Characters that are sent after these tokens, when more will follow."""
        text = decode(said)
        return len(text) - held_back(text, stops)

    def _receipt(self, num_tokens: int) -> Receipt:
        device, host = self.receipt
        return Receipt(num_tokens, device, host, 0, num_tokens - device - host)

    def storage_scope(self, scope: ReuseScope) -> ReuseScope:
        return scope

    def num_device_blocks(self, hashes: Sequence[BlockHash]) -> int:
        return min(self.num_on_device, len(hashes))

    def take_cache_changes(self) -> CacheChanges:
        changes, self.changes = self.changes, CacheChanges()
        return changes

    def stats(self) -> EngineStats:
        blocks = KvCacheStats(64, 64, 0, TOKENS_PER_BLOCK, 0, 0, 0, 0)
        return EngineStats(blocks, 0, self.num_running, 0, 0, 0, 0, self.num_turns)

    def flush(self, timeout_s: float) -> bool:
        return self.cache is None or self.cache.flush(timeout_s)

    def is_alive(self) -> bool:
        return not (self.closed or self.loop_died)

    def close(self) -> None:
        self.closed = True


class FakeHost:
    """Has the blocks at the indices below `num_present`, counted from where it is asked."""

    num_slots = 100

    def __init__(self) -> None:
        self.num_present = 0

    def stats(self) -> HostStats:
        return HostStats(100, 100, 0, 0, 0, 0, LAYOUT.block_bytes)


class FakeCache:
    """Stages every block asked for; `fetched` names those that came from the shared tier.

    `host.num_present` blocks are there at once, the others come after `stage_s`.
    """

    def __init__(self, fetched: frozenset[int] = frozenset(), stage_s: float = 0.0) -> None:
        self.host = FakeHost()
        self.num_blocks = self.host.num_slots
        self.fetched = fetched
        self.stage_s = stage_s
        self.deadline_s = 10.0
        self.is_store_usable = True
        self.num_deadline_misses = 0
        self.scopes: list[ReuseScope] = []
        self.staged: list[Sequence[BlockHash]] = []
        self.given_s: list[float] = []
        self.leased: set[int] = set()
        self.num_flushes = 0
        self.flush_timeout_s = 0.0
        self._lease_ids = itertools.count()

    def lease(
        self,
        hashes: Sequence[BlockHash],
        first: int = 0,
        scope: ReuseScope = DEFAULT_SCOPE,
    ) -> StagedPrefix:
        self.scopes.append(scope)
        return self._lease(hashes, first, min(first + self.host.num_present, len(hashes)))

    def can_fetch(self, hashes: Sequence[BlockHash], start: int) -> bool:
        return self.is_store_usable and start < len(hashes)

    def grow(
        self, staged: StagedPrefix, hashes: Sequence[BlockHash], deadline_s: float | None = None
    ) -> StagedPrefix:
        assert deadline_s is not None
        self.given_s.append(deadline_s)
        time.sleep(self.stage_s)
        self.release(staged)
        self.staged.append(hashes[staged.first :])
        return self._lease(hashes, staged.first, len(hashes))

    def lease_coming(
        self, hashes: Sequence[BlockHash], first: int, enough: int, scope: ReuseScope, wait_s: float
    ) -> StagedPrefix:
        return self.grow(StagedPrefix(HostLease(-1, ()), first=first), hashes[:enough], wait_s)

    def _lease(self, hashes: Sequence[BlockHash], first: int, end: int) -> StagedPrefix:
        lease = HostLease(next(self._lease_ids), tuple(range(first, end)))
        if lease.slots:
            self.leased.add(lease.lease_id)
        return StagedPrefix(lease, self.fetched, first)

    def miss_deadline(self) -> None:
        self.num_deadline_misses += 1

    def release(self, staged: StagedPrefix) -> None:
        self.leased.discard(staged.lease.lease_id)

    def flush(self, timeout_s: float) -> bool:
        self.num_flushes += 1
        self.flush_timeout_s = timeout_s
        return True

    def stats(self) -> CacheStats:
        return CacheStats(self.host.stats(), len(self.staged), 0, 0, 0.0, 0, 0, 0, 0, 0, 0)


DEADLY_TOKEN = 666


def build_fake_engine(config: ReplicaConfig) -> FakeEngine:
    """For `EngineReplica(config, build=...)`; an importable function, so that Ray can send it.

    Replica 0 has an engine that dies of `DEADLY_TOKEN`. All tell of `NUM_TOLD_BLOCKS` blocks, of
    the prompt 0, 1, 2, ..., on their devices.
    """
    deadly_token = DEADLY_TOKEN if config.name.endswith("-0") else None
    engine = FakeEngine(turn_s=0.005, deadly_token=deadly_token)
    told = block_hashes(range(NUM_TOLD_BLOCKS * TOKENS_PER_BLOCK), TOKENS_PER_BLOCK)
    engine.changes = CacheChanges(stored=tuple(told))
    return engine
