"""What every engine offers, whichever it is: requests in, token chunks out.

A replica owns one engine and knows it only through these types, so the embedded PyTorch engine and
TensorRT-LLM can stand in for each other.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from actors.cache_changes import CacheChanges as CacheChanges
from actors.receipt import Receipt as Receipt
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.namespace import Namespace
from shared_cache.prefix_cache import PrefixCache

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; temperature 0 is greedy.

    Random draws depend only on `seed` and the token's position in the whole sequence, so a request
    that continues on another replica draws the same tokens. Without a seed the request gets one.
    `logprobs` asks for the log-probability of each token, and of so many of the likeliest ones, as
    the model gives them: before temperature and limits.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    `num_output_so_far` counts the tokens at the end of `prompt_token_ids` that another replica has
    generated already (mid-stream failover): they count against `max_tokens` and belong to the text
    that stop strings are looked for in, but are not sent again. Text that was held back for them
    (half a character, the beginning of a stop string) is not lost: what an engine has sent after
    n tokens depends on those n tokens alone, so the next one feeds them to its text stream again
    and holds back the same.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    scope: ReuseScope = field(default_factory=ReuseScope)
    num_output_so_far: int = 0

    def continued(self, new_tokens: tuple[int, ...]) -> "GenerationRequest":
        """This request as another replica has to take it up after `new_tokens` came out."""
        return replace(
            self,
            prompt_token_ids=self.prompt_token_ids + new_tokens,
            num_output_so_far=self.num_output_so_far + len(new_tokens),
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and (token id, logarithm) of the likeliest
    tokens at its place, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What came out of one engine turn for one request, in order.

    `text` is the text that these tokens complete (a token may complete none yet). `num_accepted`
    of the tokens were drafted by n-gram look-up and confirmed. The first chunk carries the receipt,
    the last one `finish_reason`. `queue_s` and `prefill_s` are set with the receipt: seconds from
    arrival at the engine to the first turn, and from there to the first token. `logprobs` has one
    entry for each token when the request asked for them, else none.
    """

    token_ids: tuple[int, ...]
    text: str
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    receipt: Receipt | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class KvCacheStats:
    """An engine's cache counters since its start, with TensorRT-LLM's names in `as_dict`.

    A prompt block is reused when its KV was not computed for this request, whichever tier it came
    from; missed when it was. Only full blocks count.
    """

    max_num_blocks: int
    free_num_blocks: int
    used_num_blocks: int
    tokens_per_block: int
    alloc_total_blocks: int
    alloc_new_blocks: int
    reused_blocks: int
    missed_blocks: int

    @property
    def cache_hit_rate(self) -> float:
        """Reused blocks over reused and missed ones; 0 before the first prompt."""
        total = self.reused_blocks + self.missed_blocks
        return self.reused_blocks / total if total else 0.0

    def as_dict(self) -> dict[str, float]:
        """The `kvCacheStats` object of TensorRT-LLM's iteration statistics."""
        return {
            "maxNumBlocks": self.max_num_blocks,
            "freeNumBlocks": self.free_num_blocks,
            "usedNumBlocks": self.used_num_blocks,
            "tokensPerBlock": self.tokens_per_block,
            "allocTotalBlocks": self.alloc_total_blocks,
            "allocNewBlocks": self.alloc_new_blocks,
            "reusedBlocks": self.reused_blocks,
            "missedBlocks": self.missed_blocks,
            "cacheHitRate": self.cache_hit_rate,
        }


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one engine. Token counts are since its start."""

    kv_cache: KvCacheStats
    num_waiting: int
    num_running: int
    prefill_tokens: int
    generated_tokens: int
    accepted_draft_tokens: int
    proposed_draft_tokens: int
    num_turns: int


Preload = Callable[[GenerationRequest, int], Awaitable[range]]
"""See `Engine.preload`."""


class Engine(Protocol):
    """One model on one device or group of devices."""

    @property
    def namespace(self) -> Namespace:
        """What the bytes of this engine's blocks mean."""

    @property
    def cache(self) -> PrefixCache | None:
        """What the replica stages prefixes with; None when the engine shares nothing."""

    @property
    def max_total_tokens(self) -> int:
        """The longest prompt plus output that fits the model and the pool, in tokens."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the continuation; closing the generator aborts the request.

        Raises `RequestError` before the first chunk when the request can never be served.
        The receipt here tells `device`, `host` (everything loaded by the connector) and
        `computed`; the replica, which staged the prefix, splits `host` into host and shared.
        """

    @property
    def preload(self) -> Preload | None:
        """Loads to the device what host memory holds of a request's first so many blocks.

        It computes nothing. For a prompt whose other blocks are still on their way. The blocks must
        be leased until it returns, with the tokens that were loaded behind those that the device
        had; cancelling it ends it. It raises what `generate` does. None where there is no such
        thing.
        """

    def storage_scope(self, scope: ReuseScope) -> ReuseScope:
        """The scope under which this engine's blocks of a request in `scope` are stored.

        Most often `scope` itself. An engine that tells its connector less than that, or in other
        words, says here what the connector will make of it: what is staged must be what is matched.
        """

    def num_device_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are on the device now, so that nobody need stage them.

        `hashes` are those of a prompt in its request's own scope.

        A hint, cheap, from any thread: they may be gone before the request starts, and are then
        computed again. 0 when the engine cannot tell.
        """

    def take_cache_changes(self) -> CacheChanges:
        """What the engine's own memory got and lost since the last call; empty if it cannot tell.

        Not for an event loop, and for one thread at a time.
        """

    def stats(self) -> EngineStats:
        """A snapshot; cheap."""

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that is to be saved is in the cache's tiers; False when time ran out."""

    def is_alive(self) -> bool:
        """Whether the step loop still runs; False after `close` and when it died."""

    def close(self) -> None:
        """Stop, abort what runs, and free the pool."""
