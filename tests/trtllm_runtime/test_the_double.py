"""The double itself: it is as strict as upstream's manager, and no wrong byte gets past it."""

from contextlib import nullcontext
from typing import Any

import pytest

from shared_cache.connector.interface import SchedulerOutput
from shared_cache.hashing import BlockHash
from tests.trtllm_runtime.executor import DeadExecutorError
from tests.trtllm_runtime.pool import WrongBytesError
from tests.trtllm_runtime.replica import STAGES_IN_MATCH, Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.scripted import Scripted
from tests.trtllm_runtime.site import Site

PROMPT = tuple(range(6 * SIZE))


def must_fail(run: Scripted, error: type[BaseException], text: str) -> None:
    """The callback's error ends the loop for good."""
    with pytest.raises(error, match=text):
        run.executor.run()
    with pytest.raises(DeadExecutorError, match="Error in event loop"):
        run.executor.step()


def test_nothing_loaded_asynchronously_is_an_error() -> None:
    run = Scripted()
    run.scheduler.match = lambda _, num_computed: (0, True)
    run.executor.submit(Request(1, PROMPT))
    must_fail(run, RuntimeError, "load_kv_async must be False")


@pytest.mark.parametrize("num_tokens", [len(PROMPT), len(PROMPT) + SIZE])
def test_to_promise_the_whole_prompt_is_an_error(num_tokens: int) -> None:
    run = Scripted()
    run.scheduler.match = lambda _, num_computed: (num_tokens, False)
    run.executor.submit(Request(1, PROMPT))
    must_fail(run, ValueError, r"prepopulatedPromptLen .* >= promptLen")


def test_a_generation_only_request_is_an_error() -> None:
    run = Scripted()
    run.executor.submit(Request(1, PROMPT, is_generation_only=True))
    must_fail(run, RuntimeError, "generation-only")


@pytest.mark.parametrize("answer", [([99], []), ([], [99]), ([], [1])])
def test_an_id_that_was_not_handed_in_is_an_error(answer: Any) -> None:
    run = Scripted()
    run.workers[0].on_poll = lambda saving, loading: answer
    run.executor.submit(Request(1, PROMPT))
    must_fail(run, KeyError, "99|1")


def test_an_id_that_is_reported_twice_is_an_error() -> None:
    run = Scripted()
    run.scheduler.saves_async = True
    run.workers[0].on_poll = lambda saving, loading: (saving * 2, [])
    run.executor.submit(Request(1, PROMPT))
    must_fail(run, KeyError, "1")


def test_metadata_that_cannot_be_pickled_is_an_error() -> None:
    run = Scripted()
    run.scheduler.build_connector_meta = lambda output: lambda: None  # type: ignore[method-assign,assignment,return-value]
    run.executor.submit(Request(1, PROMPT))
    must_fail(run, Exception, "pickle")


@pytest.mark.parametrize("lags", [False, True])
def test_a_promise_that_is_not_kept_is_caught_before_anything_reads_it(lags: bool) -> None:
    run = Scripted(Rules(lags=lags))
    run.scheduler.match = lambda _, num_computed: (SIZE, False)
    run.executor.submit(Request(1, PROMPT))
    must_fail(run, WrongBytesError, "block 0 of its prefix")


def test_right_bytes_of_another_rank_are_wrong_bytes() -> None:
    run = Scripted(tp_size=2)
    request = Request(1, PROMPT)
    run.scheduler.match = lambda _, num_computed: (SIZE, False)

    def load() -> None:
        run.load(request)
        block = request.blocks[0]  # type: ignore[index]
        run.executor.pools[1].rows[block] = run.executor.pools[0].rows[block]

    run.workers[1].on_load = load
    run.executor.submit(request)
    must_fail(run, WrongBytesError, "rank 1")


def test_the_match_call_sees_the_base_object_only() -> None:
    run = Scripted()
    seen: list[Any] = []
    run.scheduler.match = lambda request, _: (seen.append(request), (0, False))[1]  # type: ignore[func-returns-value]
    run.executor.submit(Request(1, PROMPT, cache_salt="s", lora_task_id=0))
    run.executor.run()
    assert isinstance(seen[0].cache_salt_id, int)
    assert seen[0].lora_task_id == 0
    for name in ("cache_salt", "py_request_id", "is_dummy", "multimodal_data"):
        assert not hasattr(seen[0], name)
    with pytest.raises(IndexError):
        seen[0].get_tokens(1)


# Connectors with one mistake each, every one of which was seen somewhere. Without the mistake the
# same run is quiet: see the tests of the connector.


def reuse_twice(replica: Replica, **scope: Any) -> None:
    """One request computes, the same one again has to load."""
    replica.run(Request(1, PROMPT, 3))
    replica.settle()
    replica.executor.blocks.evict_all()
    replica.run(Request(2, PROMPT, 3, **scope))


def test_saving_chunks_before_they_are_computed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(enable_chunked_prefill=True, max_num_tokens=12)
    replica = Replica(Site(), Setup(rules))
    build = replica.scheduler.build_connector_meta

    def build_as_if_all_was_computed(output: SchedulerOutput) -> object:
        for report in output.new_requests:
            report.num_scheduled_tokens = len(report.new_tokens)
        return build(output)

    monkeypatch.setattr(replica.scheduler, "build_connector_meta", build_as_if_all_was_computed)
    with pytest.raises(WrongBytesError):
        reuse_twice(replica)
    replica.close()


def test_names_that_leave_out_what_came_before_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_alone(self: Any, tokens: Any) -> None:
        tokens = list(tokens)
        for start in range(0, len(tokens) // SIZE * SIZE, SIZE):
            self.hashes.append(BlockHash(bytes(map(int, tokens[start : start + SIZE])) * 8))

    monkeypatch.setattr("shared_cache.hashing.BlockHashChain.extend", hash_alone)
    replica = Replica(Site())
    for number, expectation in ((1, nullcontext()), (2, pytest.raises(WrongBytesError))):
        with expectation:
            replica.run(Request(number, tuple(range(SIZE)) * 4, 1))
            replica.settle()
            replica.executor.blocks.evict_all()
    replica.close()


@pytest.mark.parametrize("scope", [{"cache_salt": "a"}, {"lora_task_id": 0}])
def test_scopes_that_are_not_heeded_are_caught(
    scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shared_cache.hashing.ReuseScope.root_hash", lambda self: BlockHash(bytes(32))
    )
    replica = Replica(Site())
    with pytest.raises(WrongBytesError):
        reuse_twice(replica, **scope)
    replica.close()


def load_while_the_device_lags() -> None:
    rules = Rules(overlap=True, lags=True)
    replica = Replica(Site(), Setup(rules, STAGES_IN_MATCH, num_slots=8, is_squeezed=True))
    replica.run(Request(1, PROMPT, 1))
    replica.settle()
    replica.executor.blocks.evict_all()
    loaded = replica.submit(Request(2, PROMPT, 3))
    replica.run()
    assert loaded.num_promised_tokens == len(PROMPT) - SIZE
    replica.close()


def load_again_and_again() -> None:
    for _ in range(50):
        load_while_the_device_lags()


def test_a_lease_lives_until_the_device_has_copied() -> None:
    """In the overlapped loop the load of a turn may be done only while the next one is prepared."""
    load_while_the_device_lags()


def test_a_lease_that_ends_before_the_device_has_copied_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its slot must be written to meanwhile, by other threads: not in every run, but in some."""
    monkeypatch.setattr("shared_cache.connector.load_leases.TURNS_UNTIL_COPIED", 1)
    with pytest.raises(WrongBytesError):
        load_again_and_again()
