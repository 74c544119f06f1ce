"""Where requests enter: each is checked and prepared on the caller's side, then handed over.

A request that can never be served is refused here, with the numbers in the text, before it costs
the engine's thread anything.
"""

import itertools
import threading
from dataclasses import dataclass, field

from actors.config import NGramConfig
from actors.engine import GenerationRequest
from actors.engines.output import Output
from actors.engines.requests import check_request
from actors.engines.torch.model import LoadedModel
from actors.engines.torch.ngram import PromptLookup
from actors.engines.torch.request import ActiveRequest
from actors.engines.torch.sequence import Sequence
from shared_cache.errors import ReplicaUnavailableError
from shared_cache.hashing import prompt_chain


class RequestFactory:
    """Makes requests ready to run on one engine; safe to use from several threads."""

    def __init__(
        self,
        model: LoadedModel,
        tokens_per_block: int,
        max_total_tokens: int,
        ngram: NGramConfig | None,
    ) -> None:
        self._model = model
        self._tokens_per_block = tokens_per_block
        self._max_total_tokens = max_total_tokens
        self._ngram = ngram
        self._ids = itertools.count(1)

    def make(self, request: GenerationRequest, *, only_load: int | None = None) -> ActiveRequest:
        """The request, hashed and with its text stream; call on the event loop that reads it.

        `max_tokens` beyond the room that the prompt leaves is cut. With `only_load` nothing is
        computed, and so many of its first blocks are wanted, at most all that can be loaded. Raises
        `RequestError`.
        """
        prompt, sampling = request.prompt_token_ids, request.sampling
        check_request(request, self._model.vocab_size, self._max_total_tokens)
        chain = prompt_chain(prompt, self._tokens_per_block, request.scope)
        wanted = len(prompt) + sampling.max_tokens - request.num_output_so_far
        if only_load is not None:
            # A token more: the last one of a prompt is never loaded.
            wanted = min(len(prompt), only_load * self._tokens_per_block + 1)
            prompt = prompt[:wanted]
            chain = chain.first(prompt)
        sequence = Sequence(
            request_id=next(self._ids),
            tokens=list(prompt),
            chain=chain,
            max_total_tokens=min(wanted, self._max_total_tokens),
            loads_only=only_load is not None,
            scope=request.scope,
            lookup=PromptLookup(self._ngram.max_matching_ngram_size, prompt)
            if self._ngram and only_load is None
            else None,
        )
        output = Output(request, self._model.tokenizer, self._model.eos_token_ids)
        return ActiveRequest(request, sequence, output)


@dataclass(slots=True)
class Delivery:
    """What came in since the last turn."""

    arrivals: list[ActiveRequest] = field(default_factory=list)
    aborts: list[ActiveRequest] = field(default_factory=list)
    closing: bool = False
    has_loaded: bool = False

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.aborts or self.closing or self.has_loaded)


class Inbox:
    """Requests and aborts on their way to the engine's thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._delivery = Delivery()
        self._refusal: str | None = None

    def submit(self, active: ActiveRequest) -> None:
        """Hand a request over; `ReplicaUnavailableError` once closed."""
        with self._changed:
            if self._refusal is not None:
                raise ReplicaUnavailableError(self._refusal)
            self._delivery.arrivals.append(active)
            self._changed.notify()

    def abort(self, active: ActiveRequest) -> None:
        """Ask to end a request; one that has ended is no error."""
        with self._changed:
            self._delivery.aborts.append(active)
            self._changed.notify()

    def wake(self) -> None:
        """Say that a load is done, to who waits here."""
        with self._changed:
            self._delivery.has_loaded = True
            self._changed.notify()

    def close(self, refusal: str) -> None:
        """Refuse new requests from now on, and tell the engine's thread to end."""
        with self._changed:
            self._refusal = self._refusal or refusal
            self._delivery.closing = True
            self._changed.notify()

    def take(self, timeout_s: float | None) -> Delivery:
        """All that came in; waits for something at most `timeout_s`, or for ever (None)."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._delivery), timeout_s)
            delivery = self._delivery
            self._delivery = Delivery(closing=delivery.closing)
            return delivery
