"""What one replica remembers of its last requests: how far their prefixes came, and why no farther.

Asked for afterwards, it would be gone: what a request missed is stored by the time it has ended.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.receipt import Receipt
from shared_cache.fates import Fate
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope
from shared_cache.shortfalls import Shortfall

MAX_REQUESTS = 4096
MAX_BLOCKS = 1 << 18
"""Of all remembered requests together: 20 MB of hashes."""

Missed = Shortfall | Literal["not_asked", "host_tier_away", "no_turn"]
"""Why staging ended; beyond `Shortfall`: no tier was asked (there is none, or it is in trouble);
the owner of the node's memory did not answer in time; the deadline passed while others fetched."""


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """One request on one replica, in the namespace of that fingerprint.

    `hashes` are its full blocks that may be loaded, by the names they are stored under; `first` of
    them were on the device already, and those up to `staged` in host memory, verified, when the
    engine got it. `missed` says why staging ended there, `fate` what had become before of the block
    that it ended at. `scope` is the one that `hashes` are made in. `at_s` is seconds since the
    epoch.
    """

    request_id: str
    replica: str
    namespace: str
    at_s: float
    tokens_per_block: int
    hashes: Sequence[BlockHash]
    receipt: Receipt
    first: int
    staged: int
    missed: Missed | None
    fate: Fate | None = None
    scope: ReuseScope = field(default=DEFAULT_SCOPE, repr=False)

    @property
    def num_cached(self) -> int:
        """Leading blocks that were not computed."""
        return self.receipt.cached // self.tokens_per_block

    @property
    def is_complete(self) -> bool:
        """Whether all was reused that can be."""
        return self.num_cached >= len(self.hashes)


class RequestLog:
    """The last requests, oldest forgotten first; for one event loop."""

    def __init__(self, max_requests: int = MAX_REQUESTS, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_requests = max_requests
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._traces: OrderedDict[str, RequestTrace] = OrderedDict()

    def add(self, trace: RequestTrace) -> None:
        """Remember it; of two with one id the later one."""
        self._remove(trace.request_id)
        self._traces[trace.request_id] = trace
        self._num_blocks += len(trace.hashes)
        while self._num_blocks > self._max_blocks or len(self._traces) > self._max_requests:
            self._remove(next(iter(self._traces)))

    def find(self, request_id: str) -> tuple[RequestTrace, ...]:
        """The request of that id and, of one with several choices (`id/1`, ...), all of them."""
        prefix = f"{request_id}/"
        return tuple(
            trace
            for name, trace in self._traces.items()
            if name == request_id or name.startswith(prefix)
        )

    def earlier(self, block_hash: BlockHash, before_s: float) -> str | None:
        """The last request before that time that had this block here: it was computed or loaded."""
        for trace in reversed(self._traces.values()):
            if trace.at_s < before_s and block_hash in trace.hashes:
                return trace.request_id
        return None

    def recent(self, max_blocks: int) -> tuple[RequestTrace, ...]:
        """The last requests, latest first, with at most so many blocks together."""
        found: list[RequestTrace] = []
        for trace in reversed(self._traces.values()):
            max_blocks -= len(trace.hashes)
            if max_blocks < 0:
                break
            found.append(trace)
        return tuple(found)

    def _remove(self, request_id: str) -> None:
        trace = self._traces.pop(request_id, None)
        if trace is not None:
            self._num_blocks -= len(trace.hashes)


def now_s() -> float:
    """The time that traces bear."""
    return time.time()
