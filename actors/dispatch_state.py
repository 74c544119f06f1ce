"""What dispatch knows of one request: what came out so far, and how its search for a replica goes.

A stream that went on with a token too few or too many, or a search that began anew after every
death, would be noticed by nobody but the client. So both are kept here, away from whoever waits for
routers and replicas.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from actors.engine import GenerationRequest, TokenChunk
from shared_cache.errors import ReplicaRefusedError, ReplicaUnavailableError
from shared_cache.hashing import BlockHash, BlockHashChain

MAX_FRUITLESS_DEATHS = 2
"""A request that so many replicas died of in a row, with no new token, is not sent to another one:
it may be what kills them."""


class StreamSoFar:
    """What came out so far of one request."""

    def __init__(self, request: GenerationRequest, tokens_per_block: int) -> None:
        self.has_receipt = False
        self._request = request
        self._tokens: list[int] = []
        self._last_s: float | None = None
        self._chain = BlockHashChain(tokens_per_block, request.scope, request.prompt_token_ids)

    def take(self, chunk: TokenChunk) -> TokenChunk:
        """Note a chunk; the chunk as the caller shall see it, with the first receipt only."""
        self._tokens.extend(chunk.token_ids)
        self._chain.extend(chunk.token_ids)
        seen = replace(chunk, receipt=None) if self.has_receipt else chunk
        self.has_receipt = self.has_receipt or chunk.receipt is not None
        return seen

    def gap_s(self, now_s: float) -> float | None:
        """Seconds since the last chunk, None for the first one; mutates."""
        last_s, self._last_s = self._last_s, now_s
        return None if last_s is None else now_s - last_s

    def rest(self) -> GenerationRequest:
        """The request for what has not come out yet."""
        return self._request.continued(tuple(self._tokens))

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of what came out."""
        return self._chain.num_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens that came out."""
        return len(self._tokens)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that may still come out."""
        so_far = self._request.num_output_so_far + len(self._tokens)
        return max(0, self._request.sampling.max_tokens - so_far)

    def reusable_hashes(self) -> Sequence[BlockHash]:
        """The blocks that may be reused: the KV of the last token is not there yet."""
        return self._chain.hashes[: (self.num_tokens - 1) // self._chain.tokens_per_block]


@dataclass(slots=True)
class ReplicaSearch:
    """One request's search for a replica: how long it may last, and who has refused meanwhile.

    `num_deaths` counts replicas that died in a row without a new token of this request.
    """

    wait_s: float
    deadline_s: float = field(init=False)
    busy: set[str] = field(default_factory=set)
    num_deaths: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.deadline_s = time.monotonic() + self.wait_s

    def lost(self, error: ReplicaUnavailableError, num_tokens: int, wait_s: float) -> None:
        """A replica did not serve to the end; `num_tokens` there are now. The search goes on.

        Raises when this request may be what kills replicas.
        """
        if num_tokens > self.num_tokens:
            self.num_deaths, self.num_tokens = 0, num_tokens
        elif not isinstance(error, ReplicaRefusedError):
            self.num_deaths += 1
        if self.num_deaths >= MAX_FRUITLESS_DEATHS:
            raise ReplicaUnavailableError(
                f"{self.num_deaths} replicas ended one after the other before this request's next "
                "token; it is not tried on another one, as it may be the cause: look into their "
                f"logs before sending it again. The last one said: {error}"
            ) from error
        self.wait_s, self.deadline_s = wait_s, time.monotonic() + wait_s
