"""One request in TensorRT-LLM: submitted, read as it grows, ended by our own rules.

What it prevents: a request that runs on for nobody (whoever stops reading aborts it), tokens that
are sent twice or left out (the output is cumulative, so what was read is counted here), and an end
at another place than the embedded engine's, which a stream may have come from or may go on to.
"""

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from actors.engine import FinishReason, GenerationRequest, Receipt, TokenChunk, TokenLogprob
from actors.engines.output import Output, Taken
from actors.engines.trtllm.sampling import token_logprob
from shared_cache.errors import ReplicaUnavailableError

MakeReceipt = Callable[[int | None], Receipt]
"""The receipt, given TensorRT-LLM's own number of cached tokens."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request: its output's rules, and how many tokens it may still bring."""

    request: GenerationRequest
    output: Output
    room: int


async def read_chunks(
    result: Any, prepared: Prepared, make_receipt: MakeReceipt, counts_drafts: bool
) -> AsyncGenerator[TokenChunk, None]:
    """The chunks of a submitted request; closing this aborts it.

    The first one carries the receipt; TensorRT-LLM does not tell when it began, so all the time
    until then is `prefill_s`. `counts_drafts`: of the tokens of one turn all but one were drafts.
    """
    reader = _Reader(result, prepared)
    begun_s = time.monotonic()
    is_first = True
    try:
        async for _ in result:
            taken = reader.take()
            if not (taken.tokens or taken.text or taken.finish_reason):
                continue
            num_accepted = max(0, len(taken.tokens) - 1) if counts_drafts else 0
            logprobs = reader.logprobs(len(taken.tokens))
            chunk = TokenChunk(
                taken.tokens, taken.text, num_accepted, taken.finish_reason, logprobs=logprobs
            )
            if is_first:
                receipt = make_receipt(getattr(result, "cached_tokens", None))
                seconds = time.monotonic() - begun_s
                chunk, is_first = replace(chunk, receipt=receipt, prefill_s=seconds), False
            yield chunk
            if taken.finish_reason is not None:
                return
        raise ReplicaUnavailableError("TensorRT-LLM ended a request without saying why")
    finally:
        if not result.finished:
            result.abort()


class _Reader:
    """What is new of a cumulative output."""

    def __init__(self, result: Any, prepared: Prepared) -> None:
        self._result = result
        self._output = prepared.output
        self._room = prepared.room
        self._num_read = 0
        self._num_taken = 0
        self._num_logprobs = prepared.request.sampling.logprobs

    def logprobs(self, num_tokens: int) -> tuple[TokenLogprob, ...]:
        """Those of the last `num_tokens` tokens taken; none when none were asked for."""
        num_top = self._num_logprobs
        if num_top is None:
            return ()
        completion, span = (
            self._result.outputs[0],
            slice(self._num_taken - num_tokens, self._num_taken),
        )
        tokens, entries = completion.token_ids[span], list((completion.logprobs or [])[span])
        entries += [{}] * (len(tokens) - len(entries))
        return tuple(map(token_logprob, entries, tokens, repeat(num_top)))

    def take(self) -> Taken:
        """What has come since the last call, up to the end of the output."""
        completion = self._result.outputs[0]
        tokens = list(completion.token_ids or ())[self._num_read :]
        self._num_read += len(tokens)
        taken = self._output.take(tokens, self._room)
        self._num_taken = self._num_read - len(tokens) + len(taken.tokens)
        self._room -= len(taken.tokens)
        if taken.finish_reason is not None or not self._result.finished:
            return taken
        # An end token that TensorRT-LLM keeps to itself, its own limit, or somebody's abort.
        reason = _REASONS.get(completion.finish_reason, "abort")
        return replace(taken, text=taken.text + self._output.end(), finish_reason=reason)


_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
