"""What every engine asks of a request before it takes it.

A request that can never be served is refused on the caller's side, with the numbers in the text. An
engine that found out in its step would fail whatever else is in the batch: TensorRT-LLM asserts on
a prompt that is longer than it allows.
"""

import hashlib
from array import array
from contextlib import suppress
from functools import lru_cache

import numpy as np

from actors.engine import GenerationRequest, SamplingParams
from shared_cache.errors import PromptTooLongError, RequestError

GREEDY_TEMPERATURE = 1e-4
"""Below it the best token is taken: logits divided by less overflow, and draw nothing else."""

MAX_LOGPROBS = 20


def check_request(request: GenerationRequest, vocab_size: int, max_total_tokens: int) -> None:
    """Raise `RequestError` unless an engine with these limits and no adapters can serve it."""
    prompt, so_far = request.prompt_token_ids, request.num_output_so_far
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    outside = _token_outside(prompt, vocab_size)
    if outside is not None:
        raise RequestError(
            f"token id {outside} is outside this model's vocabulary of {vocab_size}; "
            "use this model's own tokenizer"
        )
    if request.scope.lora_id is not None:
        raise RequestError("this engine runs no LoRA adapters; send the request without one")
    if len(prompt) >= max_total_tokens:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens; prompt and output together may have "
            f"{max_total_tokens}. Shorten the prompt, or raise "
            "engine.kv_cache_config.max_tokens or engine.max_seq_len if the model allows it"
        )
    check_sampling(request.sampling)
    if not 0 <= so_far < min(len(prompt), request.sampling.max_tokens):
        raise RequestError(
            f"num_output_so_far is {so_far}; it must be below max_tokens "
            f"({request.sampling.max_tokens}) and the prompt's length ({len(prompt)})"
        )


@lru_cache(maxsize=8)
def _token_outside(prompt: tuple[int, ...], vocab_size: int) -> int | None:
    """The first token that is none; remembered, as a prompt is checked with each of its parts."""
    with suppress(OverflowError, TypeError):  # one is negative, or very large, or no number
        if np.frombuffer(array("I", prompt), np.uint32).max() < vocab_size:
            return None
    return next((token for token in prompt if not 0 <= token < vocab_size), None)


def check_sampling(params: SamplingParams) -> None:
    """Raise `RequestError`, naming the setting, unless all are in range."""
    if params.max_tokens < 1:
        raise RequestError(f"max_tokens is {params.max_tokens}; it must be at least 1")
    if not 0 <= params.temperature < float("inf"):
        raise RequestError(f"temperature is {params.temperature}; it must be 0 or more")
    if not 0 < params.top_p <= 1:
        raise RequestError(f"top_p is {params.top_p}; it must be above 0 and at most 1")
    if params.top_k < 0:
        raise RequestError(f"top_k is {params.top_k}; it must be 0 (no limit) or more")
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise RequestError(f"logprobs is {params.logprobs}; it must be 0 to {MAX_LOGPROBS}")
    if any(not stop for stop in params.stop):
        raise RequestError("a stop string is empty; remove it")


def seed_of(request: GenerationRequest) -> int:
    """The request's seed; without one, one that is the same wherever the request continues."""
    if request.sampling.seed is not None:
        return request.sampling.seed
    digest = hashlib.blake2b(request.request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
