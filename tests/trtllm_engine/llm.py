"""A double of TensorRT-LLM's `LLM`, as strict as the real one where strictness decides.

What it keeps of upstream: unknown keywords are refused; results belong to the event loop that was
running when the request was sent; outputs are cumulative; statistics and events come through queues
whose emptiness shows as one of several errors; an end token is kept to itself or not, by version.
It computes nothing: the next token is a function of all tokens before it.
"""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.trtllm_engine.pool import Pool

VOCABULARY = range(3, 259)
END = 2

LLM_FIELDS = frozenset(
    (
        "attn_backend",
        "cuda_graph_config",
        "disable_overlap_scheduler",
        "dtype",
        "enable_chunked_prefill",
        "enable_iter_perf_stats",
        "enable_iter_req_stats",
        "kv_cache_config",
        "kv_connector_config",
        "load_format",
        "max_batch_size",
        "max_beam_width",
        "max_num_tokens",
        "max_seq_len",
        "max_stats_len",
        "orchestrator_type",
        "pipeline_parallel_size",
        "return_perf_metrics",
        "revision",
        "scheduler_config",
        "skip_tokenizer_init",
        "speculative_config",
        "stream_interval",
        "tensor_parallel_size",
        "tokenizer",
        "trust_remote_code",
    )
)


def next_token(tokens: Sequence[int], ends: frozenset[int] = frozenset()) -> int:
    """The token that follows; every 29th sequence ends, if there is a token that ends it."""
    digest = hashlib.sha256(bytes(str(list(tokens)), "ascii")).digest()
    if digest[1] < 9 and ends:
        return min(ends)
    return VOCABULARY[digest[0] % len(VOCABULARY)]


@dataclass(slots=True)
class Completion:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, SimpleNamespace]] | None = None


class Result:
    """A `RequestOutput`: an async iterator over itself, bound to one event loop."""

    def __init__(self, llm: "FakeLLM", prompt: list[int], params: Any, salt: str | None) -> None:
        self.llm, self.prompt, self.params, self.salt = llm, prompt, params, salt
        self.outputs = [Completion()]
        self.finished = False
        self.cached_tokens = 0
        self.is_aborted = False
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    def abort(self) -> None:
        assert self.llm.is_running
        self.is_aborted = True
        self.llm.aborted.append(self)

    def put(self, response: Any) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, response)

    def _entry(self, token: int) -> dict[int, SimpleNamespace]:
        """The token itself in the third place, and the likeliest ones."""
        ranks = {token: 3, **{token + rank: rank for rank in range(1, self.params.logprobs + 1)}}
        return {one: SimpleNamespace(logprob=-rank / 2, rank=rank) for one, rank in ranks.items()}

    def __aiter__(self) -> "Result":
        return self

    async def __anext__(self) -> "Result":
        assert asyncio.get_running_loop() is self.loop, "another loop's result"
        if self.finished:
            raise StopAsyncIteration
        response = await self.queue.get()
        if isinstance(response, Exception):
            self.finished = True
            raise response
        tokens, reason, self.cached_tokens = response
        self.outputs[0].token_ids += tokens
        if getattr(self.params, "logprobs", None) is not None:
            entries = self.outputs[0].logprobs or []
            self.outputs[0].logprobs = entries + [self._entry(token) for token in tokens]
        self.outputs[0].finish_reason = reason
        self.finished = reason is not None
        return self


class FakeLLM:
    """One engine; a thread makes one token for every request in every turn."""

    last: "FakeLLM | None" = None
    refuse_with: Exception | None = None
    says_end_token = True
    empty_with: type[Exception] = asyncio.QueueEmpty
    tokens_per_turn = 1
    turn_s = 0.0

    def __init__(self, model: str, **arguments: Any) -> None:
        unknown = set(arguments).difference(LLM_FIELDS)
        if unknown:
            raise ValueError(f"Extra inputs are not permitted: {sorted(unknown)}")
        if self.refuse_with is not None:
            raise self.refuse_with
        FakeLLM.last = self
        self.arguments = {"model": model, **arguments}
        self.args = SimpleNamespace(**self.arguments)
        kv = arguments["kv_cache_config"]
        num_blocks = (kv.max_tokens or 4096) // kv.tokens_per_block
        num_host_blocks = (kv.host_cache_size or 0) // 64
        self.pool = Pool(kv.tokens_per_block, num_blocks, num_host_blocks, kv.event_buffer_max_size)
        self.is_running = True
        self.is_stuck = False
        self.fails_with: Exception | None = None
        self.shutdown_calls = 0
        self.results: list[Result] = []
        self.aborted: list[Result] = []
        self.num_submitted = 0
        self._entries: list[Any] = []
        self._turn = 0
        self._lock = threading.Condition()
        self._executor = SimpleNamespace(is_shutdown=lambda: not self.is_running)
        self._thread = threading.Thread(target=self._run, daemon=True, name="fake-llm")
        self._thread.start()

    # The API

    def generate_async(
        self,
        inputs: Any,
        sampling_params: Any = None,
        streaming: bool = False,
        cache_salt: str | None = None,
    ) -> Result:
        if not self.is_running:
            raise RuntimeError("LLM is shutting down")
        prompt = inputs["prompt_token_ids"]
        if not self.arguments["enable_chunked_prefill"]:
            limit = self.arguments["max_num_tokens"]
            if len(prompt) > limit:
                raise ValueError(f"prompt length ({len(prompt)}) exceeds max_num_tokens ({limit})")
        assert streaming
        assert sampling_params.end_id is not None
        result = Result(self, list(prompt), sampling_params, cache_salt)
        with self._lock:
            self.num_submitted += 1
            self.results.append(result)
            self._lock.notify_all()
        return result

    def get_stats_async(self, timeout: float | None = 2) -> AsyncIterator[Any]:
        return self._available("_entries")

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> AsyncIterator[Any]:
        return self._available("events")

    def shutdown(self) -> None:
        self.shutdown_calls += 1
        self.is_running = False
        with self._lock:
            self._lock.notify_all()
        self._thread.join()

    async def _available(self, name: str) -> AsyncIterator[Any]:
        owner = self.pool if name == "events" else self
        while True:
            with self._lock:
                entries = getattr(owner, name)
                entry = entries.pop(0) if entries else None
            if entry is None:
                raise self.empty_with
            yield entry

    # The engine

    def _run(self) -> None:
        while self.is_running:
            with self._lock:
                self._lock.wait_for(lambda: self.results or not self.is_running)
                running = list(self.results)
            if self.is_stuck or self.turn_s:
                threading.Event().wait(self.turn_s or 0.001)
            if self.is_stuck:
                continue
            for result in running:
                self._step(result)
            self._account()
            with self._lock:
                self.results = [one for one in self.results if one not in self._done]

    @property
    def _done(self) -> list[Result]:
        return [one for one in self.results if getattr(one, "is_done", False)]

    def _step(self, result: Result) -> None:
        if result.is_aborted:
            result.is_done = True  # type: ignore[attr-defined]
            result.put(([], "cancelled", result.cached_tokens))
            return
        if self.fails_with is not None:
            result.is_done = True  # type: ignore[attr-defined]
            result.put(self.fails_with)
            return
        with self._lock:
            if not hasattr(result, "said"):
                result.said = []  # type: ignore[attr-defined]
                result.found = self.pool.begin(result.prompt, result.salt)  # type: ignore[attr-defined]
        self._say(result)

    def _say(self, result: Any) -> None:
        params = result.params
        ends = frozenset([params.end_id, *(params.stop_token_ids or ())]) - {-1}
        tokens: list[int] = []
        reason = None
        while len(tokens) < self.tokens_per_turn and reason is None:
            token = next_token(result.prompt + result.said, ends)
            result.said.append(token)
            tokens.append(token)
            if token in ends:
                reason = "stop"
            elif len(result.said) >= params.max_tokens:
                reason = "length"
        if reason is not None:
            result.is_done = True
            with self._lock:
                self.pool.end(result.prompt + result.said[:-1], result.salt)
        is_stop_word = reason == "stop" and tokens[-1] != params.end_id
        is_cut = is_stop_word and not params.include_stop_str_in_output
        if reason == "stop" and (is_cut or not self.says_end_token):
            tokens.pop()
        result.put((tokens, reason, result.found))

    def _account(self) -> None:
        if not self.arguments.get("enable_iter_perf_stats"):
            return
        with self._lock:
            self._entries.append({"iter": self._turn, "kvCacheStats": self.pool.stats()})
        self._turn += 1
