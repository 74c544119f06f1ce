"""One request as the scheduler sees it: its tokens, its slots, and how far its KV is valid.

Kept apart from sampling, text and streaming, so that scheduling is tested with numbers alone.
"""

from dataclasses import dataclass, field

from actors.engines.torch.ngram import PromptLookup
from shared_cache.hashing import BlockHashChain, ReuseScope


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been generated after it.

    `num_computed` tokens have valid KV, `num_launched` will have when all passes that were put on
    the device are done; behind the prompt all but one token are. `num_unknown` tokens, of one pass
    at most, are chosen on the device and follow those in `tokens`, which the host knows. `slots[i]`
    holds block i. `num_device_tokens` and `num_loaded_tokens` are set at admission: prompt tokens
    found on the device and loaded by the connector, which still is at it while `is_loading`. With
    `loads_only` that is all that is wanted: nothing is computed. The fields `num_reported_*` say
    what the connector has been told.
    """

    request_id: int
    tokens: list[int]
    chain: BlockHashChain
    max_total_tokens: int
    scope: ReuseScope = field(default_factory=ReuseScope)
    lookup: PromptLookup | None = None
    slots: list[int] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    num_launched: int = 0
    num_unknown: int = 0
    num_device_tokens: int = 0
    num_loaded_tokens: int = 0
    is_loading: bool = False
    loads_only: bool = False
    num_published_blocks: int = 0
    num_reported_tokens: int = 0
    num_reported_slots: int = 0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """All tokens so far, those included that the host does not know yet."""
        return len(self.tokens) + self.num_unknown

    @property
    def num_unlaunched(self) -> int:
        """Tokens whose KV no pass computes so far."""
        return self.num_tokens - self.num_launched

    @property
    def is_decoding(self) -> bool:
        """True from the first generated token on."""
        return self.num_tokens > self.num_prompt_tokens

    @property
    def num_reusable_blocks(self) -> int:
        """Leading prompt blocks that may be skipped: at least one token is left to compute."""
        return (self.num_prompt_tokens - 1) // self.chain.tokens_per_block

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks, the last one perhaps not full, that `num_tokens` tokens take."""
        return -(-num_tokens // self.chain.tokens_per_block)

    def append(self, tokens: list[int]) -> None:
        """Add verified tokens."""
        self.tokens.extend(tokens)
        self.chain.extend(tokens)
        if self.lookup is not None:
            self.lookup.extend(tokens)

    # What a connector reads of a request, with TensorRT-LLM's names.

    def get_tokens(self, beam: int) -> list[int]:
        """All tokens so far; there is one beam only."""
        if beam:
            raise IndexError(f"beam {beam} of a request that has one beam")
        return self.tokens

    @property
    def hash_chain(self) -> BlockHashChain:
        """The chain of all tokens so far: ours alone, so that a connector need not hash again."""
        return self.chain

    @property
    def cache_salt(self) -> str | None:
        """The tenant's salt."""
        return self.scope.cache_salt
