"""A double of `LLM` whose executor drives the real connector over a pool that checks every byte.

It joins the two doubles: the LLM API as this folder has it, the executor of `tests/trtllm_runtime`.
"""

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.shared_cache.trtllm_doubles import OldArgs, make_args
from tests.trtllm_engine.llm import FakeLLM, Result
from tests.trtllm_runtime.executor import Executor
from tests.trtllm_runtime.oracle import LAYOUT, VOCABULARY
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import Rules

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": LAYOUT.num_kv_heads,
    "num_hidden_layers": LAYOUT.num_layers,
    "head_dim": LAYOUT.head_dim,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "torch_dtype": LAYOUT.dtype,
}
"""A config.json whose blocks are those of the runtime's pool."""


class ConnectedLLM(FakeLLM):
    """One engine on the double's executor, with the connector that its arguments name."""

    rules = Rules(num_blocks=64, max_num_tokens=64, enable_chunked_prefill=True, overlap=True)

    def __init__(self, model: str, **arguments: Any) -> None:
        kv = arguments["kv_cache_config"]
        self.llm_args = make_args(
            OldArgs,
            model=model,
            tokens_per_block=kv.tokens_per_block,
            enable_block_reuse=kv.enable_block_reuse,
            enable_partial_reuse=kv.enable_partial_reuse,
            host_cache_size=kv.host_cache_size,
            max_num_tokens=arguments["max_num_tokens"],
        )
        self._requests: dict[int, tuple[Request, Result, int]] = {}
        self._next_id = 2048
        self.error: Exception | None = None
        self._connect(arguments["kv_connector_config"])
        super().__init__(model, **arguments)
        self.args = self.llm_args  # type: ignore[assignment]

    def _connect(self, named: Any) -> None:
        module = importlib.import_module(named.connector_module)
        make_scheduler = getattr(module, named.connector_scheduler_class)
        make_worker = getattr(module, named.connector_worker_class)
        with ThreadPoolExecutor(2) as pool:
            scheduler = pool.submit(make_scheduler, self.llm_args)
            worker = pool.submit(make_worker, self.llm_args)
            self.scheduler, self.worker = scheduler.result(), worker.result()
        self.executor = Executor(self.scheduler, [self.worker], self.rules)

    def _run(self) -> None:
        try:
            while self.is_running:
                with self._lock:
                    self._lock.wait_for(lambda: self.results or not self.is_running)
                    arrivals = [one for one in self.results if not hasattr(one, "request_id")]
                for result in arrivals:
                    self._admit(result)
                self._cancel_aborted()
                self.executor.step()
                self._answer()
        except Exception as error:
            self.error = error
            self.is_running = False
            for _, result, _ in self._requests.values():
                result.put(RuntimeError(f"Error in event loop: {error!r}"))

    def _admit(self, result: Any) -> None:
        self._next_id += 1
        result.request_id = self._next_id
        params = result.params
        request = Request(
            self._next_id,
            tuple(result.prompt),
            max_new_tokens=params.max_tokens,
            end_token=None if params.end_id == -1 else params.end_id,
            cache_salt=result.salt,
        )
        self.executor.submit(request)
        self._requests[self._next_id] = (request, result, 0)

    def _cancel_aborted(self) -> None:
        for request_id, (_, result, _) in self._requests.items():
            if result.is_aborted:
                self.executor.cancel(request_id)

    def _answer(self) -> None:
        for request_id, (request, result, num_sent) in list(self._requests.items()):
            new = request.generated[num_sent:]
            cached = request.num_device_tokens + request.num_promised_tokens
            if new or request.is_finished:
                result.put((new, request.finish_reason, cached))
            self._requests[request_id] = (request, result, num_sent + len(new))
            if request.is_finished:
                del self._requests[request_id]
                with self._lock:
                    self.results.remove(result)
        self.executor.done.clear()
        if not self.executor.active:  # what lags behind: the turn after the last one
            while self.executor.step():
                pass
