"""Which requests run in a turn: guaranteed no evict, a token budget, prefill chunks.

The scheduler knows nothing of what a connector will promise: admission and budget count those
tokens as still to compute. A request is let in when all that run and it can come to their end.
"""

from collections.abc import Iterator

from tests.trtllm_runtime.blocks import SIZE, BlockManager
from tests.trtllm_runtime.reports import Batch
from tests.trtllm_runtime.requests import Request, State
from tests.trtllm_runtime.rules import Rules


def choose_batch(active: list[Request], blocks: BlockManager, rules: Rules) -> Batch:
    """The next forward pass; sets the chunk of each prompt that it prefills."""
    batch = Batch()
    budget = rules.max_num_tokens
    for request in _fitting(active, blocks, rules):
        if request.state is State.GENERATION_IN_PROGRESS and budget:
            batch.generation.append(request)
            budget -= 1
    for request in _fitting(active, blocks, rules):
        if request.state is not State.CONTEXT_INIT:
            continue
        chunk = _chunk(request, budget, rules)
        if not chunk or len(batch.all) >= rules.max_batch_size:
            break
        request.chunk_size = chunk
        batch.context.append(request)
        budget -= chunk
    return batch


def _fitting(active: list[Request], blocks: BlockManager, rules: Rules) -> Iterator[Request]:
    """Those that run, then those that may begin: first come, first served."""
    started = [request for request in active if request.blocks is not None]
    yield from started[: rules.max_batch_size]
    room = blocks.num_free - sum(
        request.max_blocks - len(request.blocks or ()) for request in started
    )
    num_running = len(started)
    for request in active:
        if request.blocks is not None:
            continue
        room -= request.max_blocks
        num_running += 1
        if room < 0 or num_running > rules.max_batch_size:
            return
        yield request


def _chunk(request: Request, budget: int, rules: Rules) -> int:
    """Prompt tokens to compute in this turn; whole blocks unless it is the last chunk."""
    remaining = request.context_remaining
    if remaining <= budget:
        return remaining
    return budget // SIZE * SIZE if rules.enable_chunked_prefill else 0


def set_prepopulated(request: Request, num_tokens: int) -> None:
    """Skip what device and connector have; `ValueError` if that is the whole prompt.

    The chunk then ends at the same place at most, at a block's border.
    """
    if num_tokens >= request.prompt_len:
        raise ValueError(
            f"request {request.request_id}: prepopulatedPromptLen ({num_tokens}) >= promptLen "
            f"({request.prompt_len})"
        )
    if num_tokens < 0:
        raise ValueError(f"request {request.request_id}: {num_tokens} tokens are promised")
    chunk = request.chunk_size
    if num_tokens + chunk < request.prompt_len:
        chunk = (num_tokens + chunk) // SIZE * SIZE - num_tokens
        assert chunk > 0, "the chunk unit is a block"
    else:
        chunk = request.prompt_len - num_tokens
    request.context_position = request.num_valid = num_tokens
    request.chunk_size = chunk
