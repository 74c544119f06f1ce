"""Questions to a replica that no request asks: what it is, what it remembers, what its store says.

They are functions over an engine, sent to where the engine is (`EngineReplica.ask`), so that a new
question is not a new method of every actor on the way.
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from actors.canary_replica import CanaryAnswer, ReplicaFacts, engine_facts
from actors.engine import Engine, GenerationRequest, KvCacheStats, TokenChunk
from actors.hottest import HotPrefix
from actors.request_log import RequestLog, RequestTrace
from actors.why import KnownBlock
from shared_cache import administration
from shared_cache.administration import Forgotten, StoreProblem
from shared_cache.cache_stats import CacheStats
from shared_cache.errors import ReplicaUnavailableError
from shared_cache.fates import BlockState
from shared_cache.hashing import BlockHash, ReuseScope, block_hashes
from shared_cache.namespace import Namespace

T = TypeVar("T")

NO_STORE = StoreProblem("no_store", "this replica has no shared cache (`cache` in its settings)")


@dataclass(frozen=True, slots=True)
class Overview:
    """What one replica has cached; `cache` is None for one that shares nothing."""

    namespace: Namespace
    cache: CacheStats | None
    device: KvCacheStats


class Asks(Protocol):
    """An `EngineReplica`, here or in another process."""

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """See `EngineReplica.ask`."""

    async def traces(self, question: Callable[[RequestLog], T]) -> T:
        """See `EngineReplica.traces`."""

    async def flush(self, timeout_s: float) -> bool:
        """See `EngineReplica.flush`."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """See `EngineReplica.generate`."""


class AskedReplica:
    """One replica, as whoever looks after it sees it; a `CanaryReplica`."""

    def __init__(self, name: str, replica: Asks) -> None:
        self.name = name
        self.replica = replica

    async def facts(self) -> ReplicaFacts:
        """See `CanaryReplica.facts`."""
        return await self.replica.ask(partial(engine_facts, self.name))

    async def answer(self, request: GenerationRequest) -> CanaryAnswer:
        """See `CanaryReplica.answer`."""
        tokens: list[int] = []
        receipt = None
        async with aclosing(self.replica.generate(request)) as stream:
            async for chunk in stream:
                tokens += chunk.token_ids
                receipt = receipt or chunk.receipt
        if receipt is None:
            raise ReplicaUnavailableError(f"{self.name} answered without a receipt")
        return CanaryAnswer(tuple(tokens), receipt)

    async def flush(self, timeout_s: float) -> bool:
        """See `CanaryReplica.flush`."""
        return await self.replica.flush(timeout_s)

    async def write_mark(self, mark: bytes) -> StoreProblem | None:
        """See `CanaryReplica.write_mark`."""
        return await self.replica.ask(partial(_write_mark, mark=mark))

    async def read_mark(self, mark: bytes) -> StoreProblem | None:
        """See `CanaryReplica.read_mark`."""
        return await self.replica.ask(partial(_read_mark, mark=mark))

    async def remove_mark(self, mark: bytes) -> StoreProblem | None:
        """See `CanaryReplica.remove_mark`."""
        return await self.replica.ask(partial(_remove_mark, mark=mark))

    async def trace(self, request_id: str) -> RequestTrace | None:
        """See `CanaryReplica.trace`."""
        return next(iter(await self.all_traces(request_id)), None)

    async def all_traces(self, request_id: str) -> tuple[RequestTrace, ...]:
        """The request of that id, and its further choices; empty when it is not remembered."""
        return await self.replica.traces(partial(_find, request_id=request_id))

    async def known(self, chain: Sequence[BlockHash], before_s: float) -> KnownBlock:
        """What it knows of the last block of `chain`, and of earlier requests that had it."""
        namespace, state = await self.replica.ask(partial(_block_state, chain=tuple(chain)))
        question = partial(_earlier, block_hash=chain[-1], before_s=before_s)
        return KnownBlock(self.name, namespace, state, await self.replica.traces(question))

    async def elsewhere(self, chain: Sequence[BlockHash]) -> tuple[str, ...]:
        """See `administration.elsewhere`."""
        return await self.replica.ask(partial(_elsewhere, chain=tuple(chain)))

    async def overview(self) -> Overview:
        """Its namespace and the counters of its cache."""
        return await self.replica.ask(_overview)

    async def num_warm_blocks(self) -> int:
        """How many blocks it should have before it is routed to: half of what memory can hold."""
        return await self.replica.ask(_num_warm_blocks)

    async def recent(self, max_blocks: int) -> tuple[RequestTrace, ...]:
        """See `RequestLog.recent`."""
        return await self.replica.traces(partial(_recent, max_blocks=max_blocks))

    async def warm(self, prefixes: Sequence[HotPrefix], timeout_s: float) -> int:
        """Stage these prefixes, one after the other, as far as time allows; how many blocks."""
        question = partial(_warm, prefixes=tuple(prefixes), timeout_s=timeout_s)
        return await self.replica.ask(question)

    async def forget_all(self) -> Forgotten:
        """See `administration.forget_all`."""
        return await self.replica.ask(_forget_all)

    async def forget(self, tokens: Sequence[int], scope: ReuseScope) -> Forgotten:
        """See `administration.forget`, for the full blocks of a prompt."""
        return await self.replica.ask(partial(_forget, tokens=tuple(tokens), scope=scope))

    async def pin(self, tokens: Sequence[int], scope: ReuseScope, ttl_s: float) -> int:
        """See `administration.pin`, for the full blocks of a prompt."""
        question = partial(_pin, tokens=tuple(tokens), scope=scope, ttl_s=ttl_s)
        return await self.replica.ask(question)


def _write_mark(engine: Engine, mark: bytes) -> StoreProblem | None:
    return NO_STORE if engine.cache is None else administration.write_mark(engine.cache, mark)


def _read_mark(engine: Engine, mark: bytes) -> StoreProblem | None:
    return NO_STORE if engine.cache is None else administration.read_mark(engine.cache, mark)


def _remove_mark(engine: Engine, mark: bytes) -> StoreProblem | None:
    return NO_STORE if engine.cache is None else administration.remove_mark(engine.cache, mark)


def _find(log: RequestLog, request_id: str) -> tuple[RequestTrace, ...]:
    return log.find(request_id)


def _earlier(log: RequestLog, block_hash: BlockHash, before_s: float) -> str | None:
    return log.earlier(block_hash, before_s)


def _block_state(engine: Engine, chain: Sequence[BlockHash]) -> tuple[str, BlockState]:
    state = BlockState(is_in_host=False, is_stored=None, fate=None)
    if engine.cache is not None:
        state = administration.block_state(engine.cache, chain)
    return engine.namespace.fingerprint, state


def _elsewhere(engine: Engine, chain: Sequence[BlockHash]) -> tuple[str, ...]:
    return () if engine.cache is None else administration.elsewhere(engine.cache, chain)


def _overview(engine: Engine) -> Overview:
    cache = None if engine.cache is None else engine.cache.stats()
    return Overview(engine.namespace, cache, engine.stats().kv_cache)


def _num_warm_blocks(engine: Engine) -> int:
    return 0 if engine.cache is None else engine.cache.num_blocks // 2


def _recent(log: RequestLog, max_blocks: int) -> tuple[RequestTrace, ...]:
    return log.recent(max_blocks)


def _warm(engine: Engine, prefixes: Sequence[HotPrefix], timeout_s: float) -> int:
    cache, num_blocks, until_s = engine.cache, 0, time.monotonic() + timeout_s
    if cache is None:
        return 0
    for prefix in prefixes:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            break
        staged = cache.grow(cache.lease(prefix.hashes, scope=prefix.scope), prefix.hashes, left_s)
        num_blocks += staged.num_blocks
        cache.release(staged)
    return num_blocks


def _forget_all(engine: Engine) -> Forgotten:
    return Forgotten(0, 0) if engine.cache is None else administration.forget_all(engine.cache)


def _forget(engine: Engine, tokens: Sequence[int], scope: ReuseScope) -> Forgotten:
    if engine.cache is None:
        return Forgotten(0, 0)
    return administration.forget(engine.cache, _stored_hashes(engine, tokens, scope))


def _pin(engine: Engine, tokens: Sequence[int], scope: ReuseScope, ttl_s: float) -> int:
    if engine.cache is None:
        return 0
    stored_scope = engine.storage_scope(scope)
    hashes = _stored_hashes(engine, tokens, scope)
    return administration.pin(engine.cache, hashes, ttl_s, stored_scope)


def _stored_hashes(engine: Engine, tokens: Sequence[int], scope: ReuseScope) -> list[BlockHash]:
    """The full blocks of a prompt under the names that this engine stores them by."""
    block = engine.namespace.layout.tokens_per_block
    return list(block_hashes(tokens, block, engine.storage_scope(scope)))
