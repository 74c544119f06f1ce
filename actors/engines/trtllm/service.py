"""Requests to one `LLM`, from the check to the last chunk, and what is counted of them on the way.

A request that TensorRT-LLM must not see (it asserts on what is longer than it allows) is refused
here. An error of TensorRT-LLM is told from an error of the request: the one may go on elsewhere.
"""

import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.config import TrtllmMode
from actors.engine import GenerationRequest, Receipt, SamplingParams, TokenChunk
from actors.engines.channel import Channel
from actors.engines.output import Output
from actors.engines.requests import check_request
from actors.engines.trtllm.api import TrtllmApi
from actors.engines.trtllm.events import PoolEvents
from actors.engines.trtllm.receipts import make_receipt
from actors.engines.trtllm.sampling import sampling_arguments
from actors.engines.trtllm.statistics import Statistics
from actors.engines.trtllm.stream import Prepared, read_chunks
from shared_cache.connector.identity import salt_by_id
from shared_cache.connector.match_log import Matched, MatchLog
from shared_cache.errors import (
    KvcommonsError,
    PromptTooLongError,
    ReplicaUnavailableError,
    RequestError,
)
from shared_cache.hashing import BlockHashChain, ReuseScope, block_hashes
from shared_cache.namespace import Namespace
from shared_cache.prefix_cache import PrefixCache

logger = logging.getLogger(__name__)

MAX_SALTS = 4096
LEAST_LEARNED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What this side knows of the model and its limits.

    `max_prompt_tokens` is set where prompts are not computed in chunks.
    """

    tokenizer: Any
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_total_tokens: int
    max_prompt_tokens: int | None = None


SawPrefill = Callable[[Sequence[tuple[int, int]], float], None]
"""Told how long spans (first token, number of tokens) took to compute."""


def _nothing(*_: object) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class SharedPart:
    """The engine's part in the shared cache: who it is, what it stages with, and how it ends.

    `matches` holds the connector's answers where it runs in this process. `saw_prefill` learns
    what computing costs, to tell when loading is worth it.
    """

    namespace: Namespace
    cache: PrefixCache | None
    leave: Callable[[], None]
    matches: MatchLog | None = None
    saw_prefill: SawPrefill = _nothing


class RequestService:
    """Serves requests on the engine's own loop; what is no coroutine is for any thread."""

    def __init__(
        self,
        llm: Any,
        api: TrtllmApi,
        model: ServedModel,
        mode: TrtllmMode,
        part: SharedPart,
    ) -> None:
        self._block = part.namespace.layout.tokens_per_block
        self.statistics = Statistics(self._block)
        self.events = PoolEvents(self._block)
        self._llm: Any = llm
        self._api = api
        self._model = model
        self._mode = mode
        self._part = part
        self._salt_id = functools.lru_cache(MAX_SALTS)(api.salt_id)
        self._channels: set[Channel] = set()

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt plus output: what the model and, once it is known, the pool hold."""
        num_blocks = self.statistics.snapshot(False).kv_cache.max_num_blocks
        pool_tokens = (num_blocks or self.events.max_num_blocks) * self._block
        return min(self._model.max_total_tokens, pool_tokens or self._model.max_total_tokens)

    def storage_scope(self, scope: ReuseScope) -> ReuseScope:
        """See `Engine.storage_scope`: the connector is told a number instead of the salt."""
        if scope.cache_salt is None:
            return scope
        return ReuseScope(salt_by_id(self._salt_id(scope.cache_salt)), scope.lora_id)

    def prepare(self, request: GenerationRequest) -> Prepared:
        """The request, checked; raises `RequestError` when it can never be served."""
        check_request(request, self._model.vocab_size, self.max_total_tokens)
        prompt, longest = request.prompt_token_ids, self._model.max_prompt_tokens
        if longest is not None and len(prompt) > longest:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens, and without chunked prefill this engine "
                f"takes {longest}; remove enable_chunked_prefill from engine.llm_args, or raise "
                "engine.max_num_tokens"
            )
        wanted = request.sampling.max_tokens - request.num_output_so_far
        room = min(wanted, self.max_total_tokens - len(prompt))
        output = Output(request, self._model.tokenizer, self._model.eos_token_ids)
        return Prepared(request, output, room)

    async def serve(self, prepared: Prepared, channel: Channel) -> None:
        """One request from submission to its last chunk; cancelling this aborts it."""
        counts, is_started = self.statistics.counts, False
        self._channels.add(channel)
        counts.num_waiting += 1
        counts.num_arrived += 1
        number, is_alone = counts.num_arrived, counts.num_waiting + counts.num_running == 1
        try:
            async with contextlib.aclosing(self._chunks(prepared)) as chunks:
                async for chunk in chunks:
                    if chunk.receipt is not None:
                        self.statistics.started(chunk.receipt)
                        is_started = True
                        if is_alone and counts.num_arrived == number:
                            self._learn_prefill(chunk.receipt, chunk.prefill_s)
                    self.statistics.came(len(chunk.token_ids), chunk.num_accepted)
                    channel.put(chunk)
        except KvcommonsError as error:
            channel.put(error)
        except Exception as error:
            logger.warning("TensorRT-LLM failed a request", exc_info=True)
            channel.put(ReplicaUnavailableError(f"TensorRT-LLM failed this request: {error}"))
        finally:
            counts.num_running -= is_started
            counts.num_waiting -= not is_started
            self._channels.discard(channel)

    async def probe(self) -> None:
        """Generate one token, less than a block, so that nothing of it is kept anywhere."""
        token = min(self._model.eos_token_ids, default=0)
        request = GenerationRequest("health", (token,), SamplingParams(1, ignore_eos=True))
        async for _ in self._chunks(self.prepare(request)):
            pass

    def end_all(self) -> None:
        """Tell whoever waits that nothing more comes."""
        for channel in tuple(self._channels):
            channel.put(TokenChunk((), "", finish_reason="abort"))

    def let_go(self) -> None:
        """Forget the `LLM`, which holds the pool."""
        self._llm = None

    def _chunks(self, prepared: Prepared) -> AsyncGenerator[TokenChunk, None]:
        request, begun_s = prepared.request, time.monotonic()
        prompt, scope = request.prompt_token_ids, request.scope
        hashes = block_hashes(prompt[:-1], self._block, scope)
        believed = self.events.num_on_device(hashes) * self._block
        self.events.expect(prompt, scope)

        def receipt(cached_tokens: int | None) -> Receipt:
            matched = self._matched(request, begun_s)
            return make_receipt(len(prompt), cached_tokens, believed, self._block, matched)

        result = self._submit(prepared)
        return read_chunks(result, prepared, receipt, counts_drafts=self._mode == "ngram")

    def _learn_prefill(self, receipt: Receipt, seconds: float) -> None:
        """What computing took, from a request that had the engine for itself and loaded nothing.

        Of few tokens most of the time is not computing.
        """
        if receipt.host == 0 and receipt.computed >= LEAST_LEARNED_TOKENS:
            self._part.saw_prefill([(receipt.device, receipt.computed)], seconds)

    def _matched(self, request: GenerationRequest, since_s: float) -> Matched | None:
        """What the connector answered for a request; None where it runs elsewhere."""
        if self._part.matches is None:
            return None
        scope = self.storage_scope(request.scope)
        chain = BlockHashChain(self._block, scope, request.prompt_token_ids)
        return self._part.matches.take(chain, since_s)

    def _submit(self, prepared: Prepared) -> Any:
        request, output = prepared.request, prepared.output
        arguments = sampling_arguments(request, prepared.room, output.end_token_ids)
        try:
            return self._llm.generate_async(
                {"prompt_token_ids": list(request.prompt_token_ids)},
                sampling_params=self._api.sampling_params(**arguments),
                streaming=True,
                cache_salt=request.scope.cache_salt,
            )
        except ValueError as error:
            raise RequestError(f"TensorRT-LLM refuses this request: {error}") from error
        except RuntimeError as error:  # it is shutting down
            raise ReplicaUnavailableError(f"TensorRT-LLM takes no requests: {error}") from error
