"""Where the tokens of one prompt came from, as exactly as TensorRT-LLM lets one tell. Pure.

A receipt that claims too much spoils what the router learns from it. TensorRT-LLM gives one number
for each request, `cached_tokens`, and follows the position from which it computes, so that blocks
which the connector loaded should count in it (never run on TensorRT-LLM). It does not say which
tokens were on the device. Where the connector runs in this process, it knows; else what its events
told of the device is taken for the device's part.
"""

from actors.engine import Receipt
from shared_cache.connector.match_log import Matched


def make_receipt(
    num_prompt_tokens: int,
    cached_tokens: int | None,
    believed_device_tokens: int,
    tokens_per_block: int,
    matched: Matched | None = None,
) -> Receipt:
    """The receipt of a prompt; `host` is everything that did not come from the device.

    `matched` is exact and decides. Else `cached_tokens` is split at `believed_device_tokens`, to
    whole blocks; without that number all counts as computed. At least one token always is.
    """
    if matched is not None:
        device, loaded = matched.device_tokens, matched.loaded_tokens
    else:
        cached = max(0, min(cached_tokens or 0, num_prompt_tokens - 1))
        device = min(cached, believed_device_tokens)
        loaded = (cached - device) // tokens_per_block * tokens_per_block
        device = cached - loaded
    computed = num_prompt_tokens - device - loaded
    return Receipt(num_prompt_tokens, device, loaded, 0, computed)
