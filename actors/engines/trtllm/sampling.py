"""Our sampling settings -> keyword arguments of TensorRT-LLM's `SamplingParams`. Pure.

Two readings of one setting must not differ between engines: temperature 0, and a temperature
without limits, which TensorRT-LLM takes for greedy unless `top_p` is given. Stop strings are not
handed on: they are looked for here, by the same rules as in the embedded engine, which also know
what another replica has sent of a stream. Every `end_id` is given, so that TensorRT-LLM adds none.

Draws come from TensorRT-LLM's own generator: with a temperature, a request that continues on
another replica goes on with other draws than it would have had.
"""

from collections.abc import Mapping
from typing import Any

from actors.engine import GenerationRequest, TokenLogprob
from actors.engines.requests import GREEDY_TEMPERATURE, seed_of

UNKNOWN_LOGPROB = -9999.0
"""OpenAI's word for a token that was not among those whose probability is told."""

_MAX_SEED = (1 << 64) - 1


def sampling_arguments(
    request: GenerationRequest, max_new_tokens: int, end_token_ids: frozenset[int]
) -> dict[str, Any]:
    """The arguments for at most `max_new_tokens` tokens, ended by any of `end_token_ids`.

    The end token stays in the output, as in the embedded engine.
    """
    params = request.sampling
    end_id, *others = sorted(end_token_ids) or [-1]
    arguments: dict[str, Any] = {
        "max_tokens": max_new_tokens,
        "end_id": end_id,
        "pad_id": max(0, end_id),
        "stop_token_ids": others or None,
        "include_stop_str_in_output": True,
        "detokenize": False,
    }
    if params.logprobs is not None:
        arguments["logprobs"] = max(1, params.logprobs)  # 0 is none in some versions
    if params.temperature < GREEDY_TEMPERATURE:
        return {**arguments, "top_k": 1}
    return {
        **arguments,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or None,
        "seed": seed_of(request) & _MAX_SEED,
    }


def token_logprob(entry: Mapping[int, Any], token: int, num_top: int) -> TokenLogprob:
    """TensorRT-LLM's entry for one place: token id -> its `logprob` and `rank`, in our words.

    It has the likeliest tokens, and in most versions the token itself, which may be one of them.
    """
    ranked = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))
    top = tuple((other, one.logprob) for other, one in ranked[:num_top])
    return TokenLogprob(entry[token].logprob if token in entry else UNKNOWN_LOGPROB, top)
