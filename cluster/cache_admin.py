"""What an administrator does with the cache of a running cluster, through all its replicas.

Replicas of one machine share its memory and all share the store, but none knows which others there
are: so everything is asked of each of them, and one that is away leaves a gap and not an error. A
deletion names those that it did not reach: what they have in memory stays.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from actors.questions import AskedReplica
from actors.request_log import RequestTrace
from actors.why import KnownBlock, Verdict, verdict
from shared_cache.administration import Forgotten
from shared_cache.errors import (
    KvcommonsError,
    ReplicaUnavailableError,
    RequestError,
    StoreError,
)
from shared_cache.hashing import ReuseScope

T = TypeVar("T")

MAX_PIN_S = 30 * 86400.0

LOOK_TIMEOUT_S = 15.0
CHANGE_TIMEOUT_S = 120.0
"""Longest wait for one replica to answer, and to delete or to fetch; one that is late is away."""

FLUSH_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Explained:
    """Where the tokens of one request came from, and why not more of them."""

    trace: RequestTrace
    verdict: Verdict

    def as_data(self) -> dict[str, Any]:
        """As JSON can hold it; hashes and salts are left out."""
        trace, verdict = self.trace, self.verdict
        return {
            "request_id": trace.request_id,
            "replica": trace.replica,
            "at": trace.at_s,
            "tokens_per_block": trace.tokens_per_block,
            "reusable_blocks": len(trace.hashes),
            "receipt": asdict(trace.receipt),
            "broken_block": verdict.broken_block,
            "reason": verdict.reason,
            "text": verdict.text,
            "details": list(verdict.details),
        }


@dataclass(frozen=True, slots=True)
class Deleted:
    """What was removed; `skipped` are the replicas that did not do it, or not all of it."""

    num_host_blocks: int
    num_objects: int
    skipped: tuple[str, ...]


class CacheAdmin:
    """Asks the replicas that `find` gives. Raises `ReplicaUnavailableError` when none answers."""

    def __init__(self, find: Callable[[], Awaitable[Sequence[AskedReplica]]]) -> None:
        self._find = find

    async def overview(self) -> dict[str, Any]:
        """Namespaces and counters of all replicas, as JSON can hold them."""
        found = await self._all(lambda one: one.overview())
        return {
            "replicas": {
                name: {
                    "namespace": asdict(one.namespace),
                    "fingerprint": one.namespace.fingerprint,
                    "device": one.device.as_dict(),
                    "cache": None if one.cache is None else asdict(one.cache),
                }
                for name, one in found.items()
            }
        }

    async def explain(self, request_id: str) -> list[Explained]:
        """A recent request, and its further choices; empty when no replica remembers it."""
        found = await self._all(lambda one: one.all_traces(request_id))
        traces = [trace for some in found.values() for trace in some]
        explained = [await self._explained(trace) for trace in traces]
        return sorted(explained, key=lambda one: (one.trace.request_id, one.trace.at_s))

    async def forget(self, prompts: Sequence[Sequence[int]], scope: ReuseScope) -> Deleted:
        """Remove the full blocks of these prompts from all machines and the store."""
        return await self._delete(
            [partial(_forget, prompt=prompt, scope=scope) for prompt in prompts]
        )

    async def forget_all(self) -> Deleted:
        """Remove all blocks that nobody has leased."""
        return await self._delete([lambda one: one.forget_all()])

    async def flush(self, names: Collection[str]) -> bool:
        """Wait until what these have saved is in the store, where the others find it.

        False when that is not known within `FLUSH_TIMEOUT_S`.
        """
        chosen = [one for one in await self._find() if one.name in names]
        found = await _answers(chosen, lambda one: one.flush(FLUSH_TIMEOUT_S), CHANGE_TIMEOUT_S)
        return len(found) == len(names) and all(found.values())

    async def pin(
        self, prompts: Sequence[Sequence[int]], scope: ReuseScope, ttl_s: float
    ) -> dict[str, int]:
        """Keep the blocks of these prompts in every machine's memory; 0 seconds end that.

        How many blocks each replica has pinned now. Raises `RequestError` for a time that no pin
        can have.
        """
        if not 0 <= ttl_s <= MAX_PIN_S:
            raise RequestError(f"ttl_s is {ttl_s:g}: a pin lasts 0 to {MAX_PIN_S:g} s (30 days)")
        pinned: dict[str, int] = {}
        for prompt in prompts:
            ask = partial(_pin, prompt=prompt, scope=scope, ttl_s=ttl_s)
            found = await self._all(ask, CHANGE_TIMEOUT_S)
            for name, num_blocks in found.items():
                pinned[name] = pinned.get(name, 0) + num_blocks
        return pinned

    async def _explained(self, trace: RequestTrace) -> Explained:
        if trace.is_complete:
            return Explained(trace, verdict(trace, ()))
        chain = trace.hashes[: trace.num_cached + 1]
        found = await self._all(lambda one: one.known(chain, trace.at_s))
        known: list[KnownBlock] = list(found.values())
        places: set[str] = set()
        if trace.missed in (None, "not_stored"):
            places = {text for some in (await self._elsewhere(chain)).values() for text in some}
        return Explained(trace, verdict(trace, known, sorted(places)))

    async def _elsewhere(self, chain: Any) -> dict[str, tuple[str, ...]]:
        try:
            return await self._all(lambda one: one.elsewhere(chain))
        except KvcommonsError:  # the store is away: the other reasons stand
            return {}

    async def _delete(
        self, questions: Sequence[Callable[[AskedReplica], Awaitable[Forgotten]]]
    ) -> Deleted:
        """Ask in turn: each counts only what it has deleted itself."""
        replicas, answers, skipped = await self._find(), list[Forgotten](), list[str]()
        for one in replicas:
            for ask in questions:
                found = await _answers([one], ask, CHANGE_TIMEOUT_S)
                answers += found.values()
                if not found:
                    skipped.append(one.name)
                    break
        if len(skipped) == len(replicas):
            raise _none_asked()
        num_host_blocks = sum(one.num_host_blocks for one in answers)
        num_objects = sum(one.num_objects for one in answers)
        return Deleted(num_host_blocks, num_objects, tuple(skipped))

    async def _all(
        self, ask: Callable[[AskedReplica], Awaitable[T]], timeout_s: float = LOOK_TIMEOUT_S
    ) -> dict[str, T]:
        """What the replicas answer that do; raises the first other error."""
        found = await _answers(await self._find(), ask, timeout_s)
        if not found:
            raise _none_asked()
        return found


def _none_asked() -> ReplicaUnavailableError:
    return ReplicaUnavailableError("no replica can be asked now")


async def _answers(
    replicas: Sequence[AskedReplica],
    ask: Callable[[AskedReplica], Awaitable[T]],
    timeout_s: float,
) -> dict[str, T]:
    """What those answer that can be asked now, in time; raises the first other error."""
    asked = (asyncio.wait_for(ask(one), timeout_s) for one in replicas)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    found: dict[str, T] = {}
    for one, answer in zip(replicas, answers, strict=True):
        if isinstance(answer, (ReplicaUnavailableError, asyncio.TimeoutError)):
            continue
        if isinstance(answer, StoreError):
            text = f"the shared tier of {one.name} cannot be used now: {answer}"
            raise ReplicaUnavailableError(text) from answer
        if isinstance(answer, BaseException):
            raise answer
        found[one.name] = answer
    return found


async def _forget(one: AskedReplica, prompt: Sequence[int], scope: ReuseScope) -> Forgotten:
    return await one.forget(prompt, scope)


async def _pin(one: AskedReplica, prompt: Sequence[int], scope: ReuseScope, ttl_s: float) -> int:
    return await one.pin(prompt, scope, ttl_s)
