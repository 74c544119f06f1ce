"""TensorRT-LLM's own connector tests, asked of the double: what they pin must hold here.

Upstream's blocks have 32 tokens, ours 4; the numbers are scaled. Upstream runs them on a GPU with
mocks for a connector. Not mirrored: beams, disaggregation with a transceiver, the V2 cache manager.
"""

import pytest

from tests.trtllm_runtime.requests import Request, State
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.scripted import Scripted

BOTH_LOOPS = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
BOTH_WAYS_TO_FINISH = pytest.mark.parametrize("finish_rule", ["P1", "P2"])
NUM_TOKENS = 10


def prompt(num_tokens: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + num_tokens))


@BOTH_LOOPS
@BOTH_WAYS_TO_FINISH
def test_simple(overlap: bool, finish_rule: str) -> None:
    run = Scripted(Rules(overlap=overlap, finish_rule=finish_rule))  # type: ignore[arg-type]
    run.executor.submit(Request(1, prompt(3), 1 + NUM_TOKENS - 1))
    run.executor.run()
    assert run.workers[0].num_registered == 1
    for name in ("build_connector_meta", "start_load_kv", "wait_for_save"):
        assert run.calls[name] == NUM_TOKENS, name
    for name in ("get_num_new_matched_tokens", "update_state_after_alloc", "request_finished"):
        assert run.calls[name] == 1, name
    assert run.calls["get_finished"] == NUM_TOKENS + overlap
    layers = [what for name, what in run.executor.manager.log if name == "wait_for_layer_load"]
    assert layers == [0, 1] * NUM_TOKENS
    assert layers == [what for name, what in run.executor.manager.log if name == "save_kv_layer"]
    assert [what for name, what in run.executor.manager.log if name == "update_state_after_alloc"]
    first, second, *later = run.outputs()
    assert (len(first.new_requests), len(first.cached_requests)) == (1, 0)
    assert len(first.new_requests[0].new_block_ids) == 1
    assert all((len(one.new_requests), len(one.cached_requests)) == (0, 1) for one in later)
    assert len(second.cached_requests[0].new_tokens) == (0 if overlap else 1)


@BOTH_LOOPS
def test_async_onboard(overlap: bool) -> None:
    run = Scripted(Rules(overlap=overlap))
    request = Request(7, prompt(22), NUM_TOKENS)
    run.scheduler.match = lambda _, num_computed: (16, True)

    def poll(saving: list[int], loading: list[int]) -> tuple[list[int], list[int]]:
        if loading:
            assert request.state is State.DISAGG_GENERATION_TRANS_IN_PROGRESS
            run.load(request)
        return saving, loading

    run.workers[0].on_poll = poll
    run.executor.submit(request)
    run.executor.run()
    polls = run.workers[0].polls
    assert polls[0] == ([], [7])
    assert all(poll == ([], []) for poll in polls[1:])
    assert len(polls) == NUM_TOKENS + 1 + overlap
    assert run.calls["get_num_new_matched_tokens"] == run.calls["update_state_after_alloc"] == 1
    parked, first = run.outputs()[:2]
    assert not parked.new_requests
    assert not parked.cached_requests
    assert first.new_requests[0].computed_position == 16  # not subtracted, unlike synchronously
    assert first.new_requests[0].num_scheduled_tokens == 6


@BOTH_LOOPS
@BOTH_WAYS_TO_FINISH
def test_async_save(overlap: bool, finish_rule: str) -> None:
    run = Scripted(Rules(overlap=overlap, finish_rule=finish_rule))  # type: ignore[arg-type]
    run.scheduler.saves_async = True
    run.executor.submit(Request(7, prompt(6), NUM_TOKENS))
    run.executor.run()
    polls = run.workers[0].polls
    assert all(poll == ([], []) for poll in polls[:-1])
    assert polls[-1] == ([7], [])
    assert run.executor.blocks.num_free == run.executor.rules.num_blocks


@BOTH_LOOPS
def test_scheduler_output(overlap: bool) -> None:
    run = Scripted(Rules(overlap=overlap))
    request = run.executor.submit(Request(1, prompt(6 * SIZE), 4 * SIZE))
    run.executor.run()
    first, *later = run.outputs()
    data = first.new_requests[0]
    assert data.new_tokens == list(request.prompt)
    assert len(data.new_block_ids) == 6
    assert (data.computed_position, data.num_scheduled_tokens) == (0, 6 * SIZE)
    lag = 1 if overlap else 0
    for index, output in enumerate(later):
        data = output.cached_requests[0]
        num_known = 6 * SIZE + max(0, index + 1 - lag)
        assert len(data.new_tokens) == (0 if overlap and not index else 1)
        assert data.computed_position == num_known - 1
        assert data.num_scheduled_tokens == 1
        assert len(data.new_block_ids) == (1 if index % SIZE == 0 else 0)


def test_scheduler_output_with_a_synchronous_match() -> None:
    run = Scripted()
    request = Request(1, prompt(6 * SIZE), 3)
    run.scheduler.match = lambda _, num_computed: (2 * SIZE, False)
    run.workers[0].on_load = lambda: request.num_launched or run.load(request)
    run.executor.submit(request)
    run.executor.run()
    first, second = run.outputs()[:2]
    data = first.new_requests[0]
    assert (data.computed_position, data.num_scheduled_tokens) == (0, 4 * SIZE)
    assert len(data.new_block_ids) == 6
    assert second.cached_requests[0].computed_position == 6 * SIZE


@BOTH_LOOPS
def test_scheduler_output_chunked_context(overlap: bool) -> None:
    rules = Rules(overlap=overlap, enable_chunked_prefill=True, max_num_tokens=16)
    run = Scripted(rules)
    request = run.executor.submit(Request(1, prompt(32), 2))
    run.executor.run()
    first, second, third = run.outputs()[:3]
    data = first.new_requests[0]
    assert (len(data.new_tokens), len(data.new_block_ids)) == (32, 8)
    assert (data.computed_position, data.num_scheduled_tokens) == (0, 16)
    data = second.cached_requests[0]
    assert (data.new_tokens, data.new_block_ids) == ([], [])
    assert (data.computed_position, data.num_scheduled_tokens) == (16, 16)
    assert third.cached_requests[0].num_scheduled_tokens == 1
    assert len(request.generated) == 2


@pytest.mark.parametrize("saves_async", [False, True])
@BOTH_LOOPS
def test_prefill_only(overlap: bool, saves_async: bool) -> None:
    """Of upstream's disaggregated prefill: one output, one end."""
    run = Scripted(Rules(overlap=overlap))
    run.scheduler.saves_async = saves_async
    run.executor.submit(Request(1, prompt(6 * SIZE), 1))
    run.executor.run()
    assert run.calls["build_connector_meta"] == run.calls["request_finished"] == 1
    assert run.executor.blocks.num_free == run.executor.rules.num_blocks


@BOTH_LOOPS
@BOTH_WAYS_TO_FINISH
def test_multi_request(overlap: bool, finish_rule: str) -> None:
    """Two requests that save asynchronously hold their blocks; a third, large one has to wait."""
    run = Scripted(Rules(num_blocks=8, overlap=overlap, finish_rule=finish_rule))  # type: ignore[arg-type]
    run.scheduler.saves_async = True
    held: list[int] = []

    def poll(saving: list[int], loading: list[int]) -> tuple[list[int], list[int]]:
        held.extend(saving)
        return ([], [])

    run.workers[0].on_poll = poll
    for number in (1, 2):
        run.executor.submit(Request(number, prompt(2 * SIZE, 100 * number), 2))
    for _ in range(10):
        run.executor.step()
    assert sorted(held) == [1, 2]
    assert run.executor.blocks.num_free == 2  # 2 requests x 3 blocks are pinned
    large = run.executor.submit(Request(3, prompt(6 * SIZE, 900), 2))
    run.executor.step()
    assert large.blocks is None
    run.workers[0].on_poll = lambda saving, loading: ([*saving, *held], [])
    run.executor.step()
    run.workers[0].on_poll = lambda saving, loading: (saving, [])
    run.executor.run()
    assert len(large.generated) == 2
    assert run.executor.blocks.num_free == 8


# The manager's unit tests, on two ranks


def test_get_finished_counts_when_all_ranks_have_said_so() -> None:
    run = Scripted(tp_size=2)
    request = Request(1, prompt(3 * SIZE), 1)
    run.scheduler.match = lambda _, num_computed: (SIZE, True)
    run.workers[0].on_poll = lambda saving, loading: (saving, loading)
    run.workers[1].on_poll = lambda saving, loading: ([], [])
    run.executor.submit(request)
    for _ in range(3):
        run.executor.step()
        assert request.state is State.DISAGG_GENERATION_TRANS_IN_PROGRESS
    run.load(request)
    run.workers[1].on_poll = lambda saving, loading: (saving, [1])
    run.executor.step()
    assert request.state is State.CONTEXT_INIT
    run.workers[1].on_poll = lambda saving, loading: (saving, loading)
    run.executor.run()
    assert len(request.generated) == 1


def test_only_rank_0_is_asked_and_all_ranks_hear_the_answer() -> None:
    run = Scripted(tp_size=2)
    request = Request(1, prompt(3 * SIZE), 1)
    asked: list[int] = []
    run.scheduler.match = lambda _, num_computed: (asked.append(num_computed), (SIZE, False))[1]  # type: ignore[func-returns-value]
    run.workers[0].on_load = lambda: run.load(request)
    run.executor.submit(request)
    run.executor.run()
    assert asked == [0]
    assert [worker.metadata for worker in run.workers] == [[{"requests": 1}]] * 2


def test_an_asynchronous_request_leaves_the_batch_and_a_synchronous_one_stays() -> None:
    run = Scripted()
    parked, runs = Request(1, prompt(3 * SIZE), 1), Request(2, prompt(3 * SIZE, 500), 1)
    run.scheduler.match = lambda request, _: (SIZE, True) if request.request_id == 1 else (0, False)
    run.workers[0].on_poll = lambda saving, loading: (saving, [])
    for request in (parked, runs):
        run.executor.submit(request)
    run.executor.step()
    assert parked.state is State.DISAGG_GENERATION_TRANS_IN_PROGRESS
    assert runs.is_finished
    assert [data.request_id for data in run.outputs()[0].new_requests] == [2]
