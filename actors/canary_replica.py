"""A replica as canaries need it, and what has to be equal in two of them for sharing.

What differs is known before anything is sent: a canary that fails then says which setting it was,
where else it could only say that nothing was found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.engine import Engine, GenerationRequest, Receipt
from actors.request_log import RequestTrace
from shared_cache.administration import Forgotten, StoreProblem
from shared_cache.hashing import ReuseScope
from shared_cache.namespace import Namespace

SALT = "kvcommons-canary"


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What decides whether two replicas can share.

    `root` is under what a plain salt is stored; `max_total_tokens` is the longest request.
    """

    replica: str
    namespace: Namespace
    root: bytes
    has_cache: bool
    max_total_tokens: int


@dataclass(frozen=True, slots=True)
class CanaryAnswer:
    """What a replica made of a canary; `tokens` are greedy."""

    tokens: tuple[int, ...]
    receipt: Receipt


class CanaryReplica(Protocol):
    """A replica as canaries need it. Calls raise `KvcommonsError` when it cannot be asked."""

    @property
    def name(self) -> str:
        """Which one."""

    async def facts(self) -> ReplicaFacts:
        """What decides whether it can share."""

    async def answer(self, request: GenerationRequest) -> CanaryAnswer:
        """Everything that comes out."""

    async def flush(self, timeout_s: float) -> bool:
        """See `EngineReplica.flush`."""

    async def write_mark(self, mark: bytes) -> StoreProblem | None:
        """See `administration.write_mark`."""

    async def read_mark(self, mark: bytes) -> StoreProblem | None:
        """See `administration.read_mark`."""

    async def remove_mark(self, mark: bytes) -> StoreProblem | None:
        """See `administration.remove_mark`."""

    async def forget(self, tokens: Sequence[int], scope: ReuseScope) -> Forgotten:
        """Remove the blocks of a prompt from host memory and store."""

    async def trace(self, request_id: str) -> RequestTrace | None:
        """What it remembers of a request."""


def engine_facts(replica: str, engine: Engine) -> ReplicaFacts:
    """The facts of a replica with this engine."""
    root = engine.storage_scope(ReuseScope(SALT)).root_hash()
    has_cache = engine.cache is not None
    return ReplicaFacts(replica, engine.namespace, root, has_cache, engine.max_total_tokens)


def differences(writer: ReplicaFacts, reader: ReplicaFacts) -> list[tuple[str, str]]:
    """What keeps the reader from finding the writer's blocks: the kind, and what differs how."""
    found = [
        ("no_cache", f"{one.replica} has no shared cache")
        for one in (writer, reader)
        if not one.has_cache
    ]
    found += [
        (field, f"{field} is {ours!r} at {writer.replica} and {theirs!r} at {reader.replica}")
        for field, (ours, theirs) in writer.namespace.differences(reader.namespace).items()
    ]
    if writer.root != reader.root:
        text = f"{writer.replica} and {reader.replica} store the same request under different salts"
        found.append(("cache_salt", text))
    return found
