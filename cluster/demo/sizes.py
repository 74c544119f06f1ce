"""How much each scenario does: fitted to the model's length, to the block size and to `--quick`.

A model with a short context gets shorter texts instead of an error, and the pools follow the
prompts, so that "room for one request" stays true for every model.
"""

from dataclasses import dataclass

from shared_cache.errors import ConfigError

MIN_MODEL_TOKENS = 192
"""Below this the smallest conversation of the load scenario does not fit."""

TURN_OVERHEAD_TOKENS = 48
"""What a question and the marks of a chat template take, generously."""


@dataclass(frozen=True, slots=True)
class LoadSizes:
    """The load scenario: traffic, and a pool smaller than what the traffic reads."""

    num_documents: int
    document_tokens: int
    num_clients: int
    conversations_per_client: int
    turns_per_conversation: int
    output_tokens: int
    pool_requests: float

    @property
    def request_tokens(self) -> int:
        """The longest request, output included, about."""
        per_turn = TURN_OVERHEAD_TOKENS + self.output_tokens
        return self.document_tokens + TURN_OVERHEAD_TOKENS + self.turns_per_conversation * per_turn

    def pool_tokens(self, tokens_per_block: int) -> int:
        """Tokens in the pool of one replica: room for `pool_requests` of the longest requests."""
        return num_blocks(int(self.pool_requests * self.request_tokens), tokens_per_block) * (
            tokens_per_block
        )


@dataclass(frozen=True, slots=True)
class OffloadSizes:
    """The offload scenario: prompt and output fill a whole number of blocks, the prompt all."""

    prompt_tokens: int
    output_tokens: int

    @property
    def pool_tokens(self) -> int:
        """A pool for exactly one request."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """All scenarios. Token counts are upper bounds; a shorter text stays as it is.

    `max_tokens` is the longest prompt plus output that the model serves.
    """

    max_tokens: int
    share_prompt_tokens: int
    share_output_tokens: int
    offload: OffloadSizes
    edit_output_tokens: int
    summary_output_tokens: int
    load: LoadSizes


def num_blocks(num_tokens: int, tokens_per_block: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // tokens_per_block)


def fitted_sizes(max_tokens: int, tokens_per_block: int, quick: bool = False) -> Sizes:
    """Sizes for a model of at most `max_tokens` tokens, prompt and output together.

    Raises `ConfigError` when the model is too short for any of it.
    """
    if max_tokens < MIN_MODEL_TOKENS:
        raise ConfigError(
            f"the demo needs a model and an engine for at least {MIN_MODEL_TOKENS} tokens, but "
            f"max_seq_len or the model allow only {max_tokens}; raise max_seq_len or take another"
        )
    share_output = 12 if quick else 32
    return Sizes(
        max_tokens=max_tokens,
        share_prompt_tokens=min(256 if quick else 2000, max_tokens - share_output),
        share_output_tokens=share_output,
        offload=_offload(min(128 if quick else 512, max_tokens), tokens_per_block),
        edit_output_tokens=min(24 if quick else 180, max_tokens // 3),
        summary_output_tokens=min(16 if quick else 64, max_tokens // 3),
        load=_load(max_tokens, quick),
    )


def _offload(total_tokens: int, tokens_per_block: int) -> OffloadSizes:
    """The output stays within the prompt's last block, so any two requests take every slot."""
    output = max(1, min(16, tokens_per_block // 2))
    blocks = max(2, total_tokens // tokens_per_block)
    return OffloadSizes(blocks * tokens_per_block - output, output)


def _load(max_tokens: int, quick: bool) -> LoadSizes:
    turns, output = 2, 4 if quick else 12
    room = max_tokens - TURN_OVERHEAD_TOKENS - turns * (TURN_OVERHEAD_TOKENS + output)
    return LoadSizes(
        num_documents=3 if quick else 6,
        document_tokens=max(16, min(128 if quick else 440, room)),
        num_clients=3 if quick else 6,
        conversations_per_client=3,
        turns_per_conversation=turns,
        output_tokens=output,
        pool_requests=1.25 if quick else 2.0,
    )
