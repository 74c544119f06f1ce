"""One request while it runs: from verified tokens to chunks on the caller's event loop."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from actors.engine import FinishReason, GenerationRequest, Receipt, TokenChunk
from actors.engines.torch.sampling import GREEDY_TEMPERATURE, sample, seed_of
from actors.engines.torch.sequence import Sequence
from actors.engines.torch.text import TextStream


class Channel:
    """A queue from the engine's thread to one coroutine; the only thing both sides touch."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenChunk | Exception] = asyncio.Queue()

    def put(self, item: TokenChunk | Exception) -> bool:
        """Hand over from the engine's thread; False when the event loop is gone."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody will read
            return False
        return True

    async def get(self) -> TokenChunk:
        """The next chunk; raises what the engine sent instead of one."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request with its place in the scheduler, its text so far and its way back."""

    request: GenerationRequest
    sequence: Sequence
    text: TextStream
    end_token_ids: frozenset[int]
    channel: Channel = field(default_factory=Channel)
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    num_turns_with_output: int = 0

    @property
    def sampler(self) -> Callable[[torch.Tensor, int], int] | None:
        """How tokens are drawn; None for greedy."""
        params = self.request.sampling
        if params.temperature < GREEDY_TEMPERATURE:
            return None
        seed = seed_of(self.request.request_id) if params.seed is None else params.seed
        return lambda logits, position: sample(logits, params, seed, position)

    def take(self, tokens: list[int], num_accepted: int) -> TokenChunk:
        """The chunk for verified `tokens`, cut where the output ends.

        `num_accepted` of them, the leading ones, were drafts.
        """
        room = self.sequence.max_total_tokens - len(self.sequence.tokens)
        texts: list[str] = []
        finish: FinishReason | None = None
        num_taken = 0
        while finish is None and num_taken < len(tokens):
            finish = self._take_one(tokens[num_taken], texts)
            num_taken += 1
            if finish is None and num_taken == room:
                finish = "length"
        if finish is not None and not self.text.stopped:
            texts.append(self.text.finish())
        return self._chunk(tokens[:num_taken], "".join(texts), num_accepted, finish)

    def _take_one(self, token: int, texts: list[str]) -> FinishReason | None:
        if token in self.end_token_ids:
            return "stop"
        texts.append(self.text.feed(token))
        return "stop" if self.text.stopped else None

    def _chunk(
        self, tokens: list[int], text: str, num_accepted: int, finish: FinishReason | None
    ) -> TokenChunk:
        accepted = min(num_accepted, len(tokens))
        self.num_turns_with_output += 1
        if self.num_turns_with_output > 1 or self.started_s is None:
            return TokenChunk(tuple(tokens), text, accepted, finish)
        return TokenChunk(
            tuple(tokens),
            text,
            accepted,
            finish,
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
