"""The executor's loop, one turn at a time, plain or overlapped with the device.

In the plain loop the host sees a turn's tokens before the next one. In the overlapped loop it
launches the next forward pass first: reports lag by a token, and a request that stops by a token of
its own is computed once more after its end. What a connector raises ends the loop, as in
TensorRT-LLM, and the test with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.trtllm_runtime.batches import choose_batch, set_prepopulated
from tests.trtllm_runtime.blocks import SIZE, BlockManager
from tests.trtllm_runtime.manager import ConnectorManager
from tests.trtllm_runtime.oracle import LAYOUT
from tests.trtllm_runtime.pool import Pass, RankPool
from tests.trtllm_runtime.reports import Batch
from tests.trtllm_runtime.requests import Request, State
from tests.trtllm_runtime.rules import Rules
from tests.trtllm_runtime.stream import DeviceStream


class DeadExecutorError(RuntimeError):
    """The loop has ended because a callback raised."""


@dataclass(slots=True)
class Launched:
    """A forward pass that was launched, and what the host will see when it is through."""

    batch: Batch
    tickets: list[int]
    shows: list[tuple[Request, int]] = field(default_factory=list)


class Executor:
    """One engine: ranks in lock-step over one set of blocks. `step` is one turn of its loop."""

    def __init__(self, scheduler: Any, workers: Sequence[Any], rules: Rules) -> None:
        self.rules = rules
        self.blocks = BlockManager(
            rules.num_blocks, partial_reuse=rules.partial_reuse, newest_first=rules.newest_first
        )
        self.pools = [_pool_of(worker, rules, rank) for rank, worker in enumerate(workers)]
        self.streams = [DeviceStream(lags=rules.lags) for _ in workers]
        self.manager = ConnectorManager(scheduler, workers, is_later=rules.is_later)
        for worker in workers:
            take_callable = getattr(worker, "register_forward_pass_callable", None)
            assert take_callable is None or take_callable() is None, "not part of this double"
        for worker, pool in zip(workers, self.pools, strict=True):
            worker.register_kv_caches(pool.tensor)
        self.active: list[Request] = []
        self.done: list[Request] = []
        self.canceled: set[int] = set()
        self.saving: dict[int, list[int]] = {}
        self.num_turns = 0
        self.num_failed_passes = 0
        self.num_poisoned_passes = 0
        self.fails_next_pass = False
        self.is_dead = False
        self._previous: Launched | None = None

    def submit(self, request: Request) -> Request:
        """Queue a request; `ValueError` for one that can never run."""
        too_long = request.prompt_len > self.rules.max_num_tokens
        if request.max_blocks > self.rules.num_blocks or not request.prompt:
            raise ValueError(f"request {request.request_id} does not fit")
        if too_long and not self.rules.enable_chunked_prefill:
            raise ValueError(f"request {request.request_id} is longer than max_num_tokens")
        self.active.append(request)
        return request

    def cancel(self, request_id: int) -> None:
        """Ask for the end of a request; heeded where the loop looks for it."""
        self.canceled.add(request_id)

    def step(self) -> bool:
        """One turn; False when the loop would sleep, as nothing is active."""
        if self.is_dead:
            raise DeadExecutorError("Error in event loop")
        if not self.active and self._previous is None:
            return False
        self.num_turns += 1
        try:
            if self.rules.overlap:
                self._overlapped_turn()
            else:
                self._plain_turn()
            self._end_saves(self.manager.poll())
        except BaseException:
            self.is_dead = True
            raise
        return True

    def run(self, max_turns: int = 10_000) -> None:
        """Turn after turn until all requests have ended."""
        for _ in range(max_turns):
            if not self.step():
                return
        raise AssertionError(f"requests are stuck: {self.active}")

    def check(self) -> None:
        """The double's own books."""
        held = [request.blocks for request in self.active if request.blocks is not None]
        self.blocks.check([*held, *self.saving.values()])

    # One turn

    def _plain_turn(self) -> None:
        batch = choose_batch(self.active, self.blocks, self.rules)
        if batch.all:
            self._prepare(batch)
        if not batch.all:
            return
        launched = self._launch(batch)
        if launched is None:
            return
        self._show(launched)
        self._tell_finished(batch.all)
        self._end_requests()
        self._store_context(batch)

    def _overlapped_turn(self) -> None:
        batch = choose_batch(self.active, self.blocks, self.rules)
        if batch.all:
            self._prepare(batch)
        previous, self._previous = self._previous, None
        launched = self._launch(batch) if batch.all else None
        if launched is None and batch.all:  # it failed, and all requests with it
            return
        if previous is not None:
            self._show(previous)
            self._tell_finished(previous.batch.all)
            self._end_requests()
            self._store_context(previous.batch)
        self._previous = launched

    def _prepare(self, batch: Batch) -> None:
        """Allocate, match, report, start the loads: all before the forward pass."""
        for request in batch.context:
            if request.blocks is None and self.manager.should_add_sequence(request):
                self._add_sequence(request)
        for request in batch.generation:
            self.blocks.add_token(request)
        self.manager.report(batch)
        self.manager.start_batch(batch, self.streams)

    def _add_sequence(self, request: Request) -> None:
        for copy in self.blocks.add_sequence(request):
            for pool, stream in zip(self.pools, self.streams, strict=True):
                stream.put(lambda pool=pool, copy=copy: pool.copy(copy.source, copy.target))
        if not request.is_dummy:
            request.num_promised_tokens = self.manager.match(request, request.num_device_tokens)
        set_prepopulated(request, request.num_device_tokens + request.num_promised_tokens)
        assert request.blocks is not None
        loaded = range(request.num_device_tokens // SIZE, request.num_valid // SIZE)
        promised = {request.blocks[index] for index in loaded}
        request.fresh_blocks = [one for one in request.fresh_blocks if one not in promised]
        self.manager.allocated(request)

    def _launch(self, batch: Batch) -> Launched | None:
        """The forward pass and what follows it; None when it failed, and all requests with it."""
        if self.fails_next_pass:
            self.fails_next_pass = False
            self._fail_all(batch)
            return None
        parts = [self._part(request) for request in batch.all]
        has_hooks = bool(batch.context) or not self.rules.cuda_graphs
        for layer in range(LAYOUT.num_layers if has_hooks else 0):
            self.manager.wait_for_layer(layer, self.streams)
            self.manager.save_layer(layer, self.streams)
        tickets = []
        for pool, stream in zip(self.pools, self.streams, strict=True):
            for part in parts:
                ticket = stream.put(lambda pool=pool, part=part: pool.forward(part))
            tickets.append(ticket)
        self.manager.wait_for_save(self.streams)
        launched = Launched(batch, tickets)
        for request in batch.all:
            self._advance(request, launched)
        return launched

    def _part(self, request: Request) -> Pass:
        assert request.blocks is not None
        is_context = request.state is State.CONTEXT_INIT
        stop = request.num_valid + (request.chunk_size if is_context else 1)
        fresh = [one for one in request.fresh_blocks if one in request.blocks[: -(-stop // SIZE)]]
        request.fresh_blocks = [one for one in request.fresh_blocks if one not in fresh]
        states = tuple(request.trail.states[:stop])
        behind = request.blocks[: -(-request.num_valid // SIZE)]
        is_poisoned = not self.blocks.poisoned.isdisjoint(behind)
        if is_poisoned:
            self.num_poisoned_passes += 1
            self.blocks.poisoned.update(
                request.blocks[request.num_valid // SIZE : -(-stop // SIZE)]
            )
        part = (tuple(request.blocks), states, request.num_valid, stop, tuple(fresh))
        return Pass(request.request_id, *part, is_poisoned)

    def _advance(self, request: Request, launched: Launched) -> None:
        """What the pass does to a request, and what the host will see of it."""
        if request.state is State.CONTEXT_INIT:
            request.context_position += request.chunk_size
            request.num_valid = request.context_position
            if request.context_remaining:
                return
            request.state = State.GENERATION_IN_PROGRESS
        else:
            request.num_valid += 1
        request.sample()
        launched.shows.append((request, len(request.tokens)))
        request.num_launched += 1
        if self.rules.overlap and request.num_launched >= request.max_new_tokens:
            request.state = State.GENERATION_TO_COMPLETE

    # The end of requests

    def _show(self, launched: Launched) -> None:
        """Wait for the pass's tokens, and look at them."""
        for stream, ticket in zip(self.streams, launched.tickets, strict=True):
            stream.wait_for(ticket)
        for request, num_tokens in launched.shows:
            if not request.is_finished:
                request.show(num_tokens)

    def _tell_finished(self, requests: Sequence[Request]) -> None:
        """P2: those of the batch that came to their end by themselves."""
        if self.rules.finish_rule == "P2":
            for request in requests:
                if request.is_finished and request.blocks is not None:
                    self._tell(request)

    def _tell(self, request: Request) -> None:
        if self.manager.finished(request):
            assert request.blocks is not None
            self.blocks.store(request, self._num_reusable(request))
            self.saving[request.request_id] = list(request.blocks)
            self.blocks.pin(request.blocks)

    def _end_requests(self) -> None:
        """Heed cancellations, then free what has ended."""
        for request in self.active:
            if request.request_id in self.canceled:
                self.canceled.discard(request.request_id)
                request.end("cancelled")
        for request in [one for one in self.active if one.is_finished]:
            self._terminate(request, self._num_reusable(request))
        self.canceled &= {request.request_id for request in self.active}

    def _terminate(self, request: Request, num_reusable: int) -> None:
        self.active.remove(request)
        self.done.append(request)
        if request.blocks is None:
            return  # it never had any: nobody is told
        if self.rules.finish_rule == "P1":
            self._tell(request)
        self.blocks.remove_sequence(request, num_reusable)

    def _num_reusable(self, request: Request) -> int:
        """Tokens that the device keeps of an ended request: the last one is never among them."""
        num_tokens = request.num_visible - 1
        return num_tokens if self.rules.keeps_uncomputed else min(request.num_valid, num_tokens)

    def _fail_all(self, batch: Batch) -> None:
        """The forward pass raised: all active requests fail, the engine goes on.

        It keeps their blocks for reuse, though nobody can say what is in them.
        """
        self.num_failed_passes += 1
        for stream in self.streams:
            stream.drain()
        for request in batch.all:
            self._scribble(request)
        for request in list(self.active):
            request.end("error")
            keeps = self.rules.keeps_uncomputed
            self._terminate(request, self._num_reusable(request) if keeps else 0)

    def _scribble(self, request: Request) -> None:
        """A pass that fails may have written anything where it was to write."""
        assert request.blocks is not None
        num_tokens = request.chunk_size if request.state is State.CONTEXT_INIT else 1
        for position in range(request.num_valid, request.num_valid + num_tokens):
            for pool in self.pools:
                pool.scribble(request.blocks[position // SIZE], position % SIZE)

    def _store_context(self, batch: Batch) -> None:
        """What was prefilled becomes reusable while its request still runs."""
        for request in batch.context:
            if request.blocks is not None:
                self.blocks.store(request, min(request.context_position, request.prompt_len - 1))

    def _end_saves(self, saved: Sequence[Request]) -> None:
        for request in saved:
            self.blocks.unpin(list(reversed(self.saving.pop(request.request_id))))


def _pool_of(worker: Any, rules: Rules, rank: int) -> Any:
    """A rank's pool: here, or where its worker is."""
    make_pool = getattr(worker, "make_pool", None)
    return RankPool(rules.num_blocks, rank) if make_pool is None else make_pool(rules.num_blocks)
