"""One request while it runs: from verified tokens to chunks on the caller's event loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from actors.engine import GenerationRequest, Receipt, TokenChunk
from actors.engines.channel import Channel
from actors.engines.output import Output, Taken
from actors.engines.requests import GREEDY_TEMPERATURE, seed_of
from actors.engines.torch.logprobs import LogprobNotes, greedy
from actors.engines.torch.sampling import sample
from actors.engines.torch.sequence import Sequence


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request with its place in the scheduler, its text so far and its way back."""

    request: GenerationRequest
    sequence: Sequence
    output: Output
    channel: Channel = field(default_factory=Channel)
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    num_turns_with_output: int = 0
    notes: LogprobNotes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        num_top = self.request.sampling.logprobs
        if num_top is not None:
            self.notes = LogprobNotes(self._draw or greedy, num_top)

    @property
    def sampler(self) -> Callable[[torch.Tensor, int], int] | None:
        """How tokens are drawn; None for greedy."""
        return self._draw if self.notes is None else self.notes

    @property
    def _draw(self) -> Callable[[torch.Tensor, int], int] | None:
        params = self.request.sampling
        if params.temperature < GREEDY_TEMPERATURE:
            return None
        seed = seed_of(self.request)
        return lambda logits, position: sample(logits, params, seed, position)

    def take(self, tokens: list[int], num_accepted: int) -> TokenChunk:
        """The chunk for verified `tokens`, cut where the output ends.

        `num_accepted` of them, the leading ones, were drafts.
        """
        room = self.sequence.max_total_tokens - len(self.sequence.tokens)
        return self._chunk(self.output.take(tokens, room), num_accepted)

    def _chunk(self, taken: Taken, num_accepted: int) -> TokenChunk:
        num_tokens = len(taken.tokens)
        chunk = TokenChunk(
            taken.tokens,
            taken.text,
            min(num_accepted, num_tokens),
            taken.finish_reason,
            logprobs=() if self.notes is None else self.notes.take(num_tokens),
        )
        self.num_turns_with_output += 1
        if self.num_turns_with_output > 1 or self.started_s is None:
            return chunk
        return replace(
            chunk,
            receipt=self._receipt(),
            queue_s=self.started_s - self.arrived_s,
            prefill_s=time.monotonic() - self.started_s,
        )

    def _receipt(self) -> Receipt:
        sequence = self.sequence
        device, loaded = sequence.num_device_tokens, sequence.num_loaded_tokens
        return Receipt(
            prompt_tokens=sequence.num_prompt_tokens,
            device=device,
            host=loaded,
            shared=0,
            computed=sequence.num_prompt_tokens - device - loaded,
        )
