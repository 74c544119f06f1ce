"""Our sampling settings -> keyword arguments of TensorRT-LLM's `SamplingParams`. Pure.

Two readings of one setting must not differ between engines: temperature 0, and a temperature
without limits, which TensorRT-LLM takes for greedy unless `top_p` is given. Stop strings are not
handed on: they are looked for here, by the same rules as in the embedded engine, which also know
what another replica has sent of a stream. Every `end_id` is given, so that TensorRT-LLM adds none.

Draws come from TensorRT-LLM's own generator: with a temperature, a request that continues on
another replica goes on with other draws than it would have had.
"""

from typing import Any

from actors.engine import GenerationRequest
from actors.engines.requests import GREEDY_TEMPERATURE, seed_of

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
    if params.temperature < GREEDY_TEMPERATURE:
        return {**arguments, "top_k": 1}
    return {
        **arguments,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or None,
        "seed": seed_of(request) & _MAX_SEED,
    }
