"""Canaries: does every replica load what each other one has stored, and if not, exactly why?

A cache that shares nothing fails without a sound: answers are right, and only slower. A setting
that differs between two replicas, a store that one of them cannot reach or write, a salt: each
looks like an empty cache. So a prefix that nobody else uses is computed by one replica and asked of
the others, which must load it and go on with the same tokens.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from actors.canary_replica import SALT, CanaryAnswer, CanaryReplica, ReplicaFacts, differences
from actors.engine import GenerationRequest, SamplingParams
from actors.findings import Finding
from actors.why import WHY
from shared_cache.administration import StoreProblem
from shared_cache.errors import KvcommonsError, RequestError
from shared_cache.hashing import ReuseScope

CANARY_BLOCKS = 3
CANARY_TOKENS = 4
FLUSH_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 120.0
"""A replica that takes longer for a canary counts as one that cannot be tried."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PairFinding:
    """What one canary showed: `reader` asked for what `writer` stored. `kind` is why it failed."""

    writer: str
    reader: str
    finding: Finding
    kind: str = ""


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """One round over all pairs; `stores` are about each replica's shared tier by itself."""

    pairs: tuple[PairFinding, ...]
    stores: tuple[Finding, ...]
    ended_s: float
    seconds: float

    @property
    def failures(self) -> list[Finding]:
        """What is wrong; an empty list is a cluster that shares."""
        return [one for one in self.findings if one.state == "fail"]

    @property
    def findings(self) -> list[Finding]:
        """Everything that was found."""
        return [*self.stores, *(one.finding for one in self.pairs)]


async def try_pairs(replicas: Sequence[CanaryReplica]) -> CanaryReport:
    """Send a canary through every ordered pair, one after the other; never raises for a replica."""
    started_s = time.monotonic()
    facts: dict[str, ReplicaFacts] = {}
    stores: list[Finding] = []
    for one in replicas:
        try:
            facts[one.name] = await _within(one.facts())
        except (KvcommonsError, TimeoutError) as error:  # noqa: PERF203
            stores.append(Finding(one.name, "fail", f"cannot be asked: {error or 'no answer'}"))
    here = [one for one in replicas if one.name in facts]
    marks: dict[str, _StoreMark] = {}
    pairs: list[PairFinding] = []
    try:
        for one in here:
            if facts[one.name].has_cache:
                marks[one.name] = mark = await _StoreMark.write(one)
                stores.append(mark.finding())
        for writer in here:
            round_ = _WriterRound(writer, facts, marks.get(writer.name))
            pairs += await round_.run([one for one in here if one is not writer])
    finally:
        for mark in marks.values():
            await mark.remove()
    return CanaryReport(tuple(pairs), tuple(stores), time.time(), time.monotonic() - started_s)


class _StoreMark:
    """A block that one replica has written straight to its shared tier, or why it could not."""

    def __init__(self, writer: CanaryReplica) -> None:
        self.mark = uuid.uuid4().bytes
        self.problem: StoreProblem | None = None
        self._writer = writer

    @classmethod
    async def write(cls, writer: CanaryReplica) -> "_StoreMark":
        self = cls(writer)
        self.problem = await _problem(writer.write_mark(self.mark))
        return self

    def finding(self) -> Finding:
        name = f"store of {self._writer.name}"
        if self.problem is None:
            return Finding(name, "ok", "written and readable")
        is_meant = self.problem.kind in ("no_store", "read_only")
        return Finding(name, "warn" if is_meant else "fail", _store_text(self.problem))

    async def read_by(self, reader: CanaryReplica) -> StoreProblem | None:
        if self.problem is not None:
            return self.problem
        return await _problem(reader.read_mark(self.mark))

    async def remove(self) -> None:
        if self.problem is None:
            await _problem(self._writer.remove_mark(self.mark))


class _WriterRound:
    """Canaries that one replica computes and the others ask for."""

    def __init__(
        self, writer: CanaryReplica, facts: dict[str, ReplicaFacts], mark: _StoreMark | None
    ) -> None:
        self._writer = writer
        self._facts = facts
        self._mark = mark
        self._requests: list[GenerationRequest] = []

    async def run(self, readers: Sequence[CanaryReplica]) -> list[PairFinding]:
        """One finding for each reader. A canary serves until a reader had to compute it."""
        found = []
        expected: tuple[int, ...] | None = None
        try:
            for reader in readers:
                try:
                    if expected is None:
                        expected = await self._lay()
                    finding = await self._ask(reader, expected)
                except (KvcommonsError, TimeoutError) as error:
                    text = f"could not be tried: {error or 'no answer in time'}"
                    finding = self._finding(reader, "fail", text, "away")
                if finding.kind:
                    expected = None
                found.append(finding)
        finally:
            for one, request in itertools.product((self._writer, *readers), self._requests):
                await _forgotten(one, request)
        return found

    async def _lay(self) -> tuple[int, ...]:
        """Have a new canary computed and stored; what follows it when it is loaded."""
        request = canary_request(self._num_tokens())
        self._requests.append(request)
        await _within(self._writer.answer(request))
        await _within(self._writer.flush(FLUSH_TIMEOUT_S))
        again = await _within(self._writer.answer(request))  # computed as a reader will compute it
        return again.tokens

    def _num_tokens(self) -> int:
        """A few whole blocks of every replica, and a token to compute."""
        block = max(one.namespace.layout.tokens_per_block for one in self._facts.values())
        limit = min(one.max_total_tokens for one in self._facts.values())
        num_blocks = min(CANARY_BLOCKS, (limit - CANARY_TOKENS - 1) // block)
        if num_blocks < 1:
            raise RequestError(
                f"no request can hold a whole block: {limit} tokens fit, and tokens_per_block is "
                f"{block}; lower it, or raise engine.max_seq_len or kv_cache_config.max_tokens"
            )
        return num_blocks * block + 1

    async def _ask(self, reader: CanaryReplica, expected: tuple[int, ...]) -> PairFinding:
        request, facts = self._requests[-1], self._facts[reader.name]
        answer = await _within(reader.answer(request))
        block = facts.namespace.layout.tokens_per_block
        num_wanted = (len(request.prompt_token_ids) - 1) // block * block
        if answer.receipt.cached < num_wanted:
            return await self._failed(reader, answer)
        if answer.tokens != expected:
            text = f"loaded blocks give other tokens: {answer.tokens}, not {expected}"
            return self._finding(reader, "fail", text, "tokens")
        problem = await self._mark.read_by(reader) if self._mark else None
        way = "the store" if answer.receipt.shared else "this machine's memory"
        text = f"loaded {answer.receipt.cached} tokens from {way}"
        if problem is None or problem.kind == "no_store":
            return self._finding(reader, "ok", text)
        state = "warn" if problem.kind == "read_only" else "fail"
        text = f"{text}, but nothing through the store: {_store_text(problem)}"
        return self._finding(reader, state, text, problem.kind)

    async def _failed(self, reader: CanaryReplica, answer: CanaryAnswer) -> PairFinding:
        """Why it was not all loaded: what differs first, then the store, then what staging says."""
        facts, cached = self._facts, answer.receipt.cached
        reasons = differences(facts[self._writer.name], facts[reader.name])
        if not reasons and self._mark is not None:
            problem = await self._mark.read_by(reader)
            if problem is not None and problem.kind != "no_store":
                reasons.append((problem.kind, _store_text(problem)))
        if not reasons:
            trace = await _within(reader.trace(self._requests[-1].request_id))
            missed = trace.missed if trace else None
            reasons.append((missed or "engine", WHY[missed or "engine"]))
        kind = reasons[0][0]
        text = f"loaded {cached} of {answer.receipt.prompt_tokens - 1} tokens: "
        text += "; ".join(text for _, text in reasons)
        return self._finding(reader, "warn" if kind == "cost_gate" else "fail", text, kind)

    def _finding(self, reader: CanaryReplica, state: str, text: str, kind: str = "") -> PairFinding:
        writer = self._writer.name
        name = f"{writer} -> {reader.name}"
        return PairFinding(writer, reader.name, Finding(name, state, text), kind)  # type: ignore[arg-type]


def canary_request(num_tokens: int) -> GenerationRequest:
    """A prompt of so many tokens that every model has, in a scope that nobody else uses."""
    name = uuid.uuid4().hex
    prompt = tuple(3 + (7 * index) % 97 for index in range(num_tokens))
    sampling = SamplingParams(CANARY_TOKENS, ignore_eos=True)
    return GenerationRequest(f"canary-{name}", prompt, sampling, ReuseScope(f"{SALT}-{name}"))


async def _within(call: Awaitable[T]) -> T:
    try:
        return await asyncio.wait_for(call, CALL_TIMEOUT_S)
    except asyncio.TimeoutError as error:  # another class before Python 3.11
        raise TimeoutError(f"no answer within {CALL_TIMEOUT_S:g} s") from error


async def _problem(call: Awaitable[StoreProblem | None]) -> StoreProblem | None:
    """What a look at a store says; one that hangs is unreachable."""
    try:
        return await _within(call)
    except (KvcommonsError, TimeoutError) as error:
        return StoreProblem("unreachable", str(error))


async def _forgotten(one: CanaryReplica, request: GenerationRequest) -> None:
    """Leave nothing of a canary behind, where that can be reached."""
    with suppress(KvcommonsError, TimeoutError):
        await _within(one.forget(request.prompt_token_ids, request.scope))


def _store_text(problem: StoreProblem) -> str:
    words = {"read_only": "read-only store", "unreachable": "unreachable store"}
    return f"{words.get(problem.kind, 'store')}: {problem.text}"
