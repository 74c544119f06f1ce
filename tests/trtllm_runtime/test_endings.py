"""Requests that do not come to their end, and ids that come again: nothing wrong stays behind."""

from dataclasses import replace
from typing import Any

import pytest

from shared_cache.connector.plan import EXPIRE_TURNS
from tests.shared_cache.fakes import FakeClock
from tests.trtllm_runtime.cold import IN_ALL_LOOPS, PROMPT, cold, finish, other_prompt
from tests.trtllm_runtime.replica import STAGES_IN_MATCH, Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.site import Site


@IN_ALL_LOOPS
@pytest.mark.parametrize("num_turns", range(8))
def test_requests_that_are_cancelled_at_any_turn(rules: Rules, num_turns: int) -> None:
    rules = replace(rules, enable_chunked_prefill=True, max_num_tokens=16)
    replica = Replica(Site(), Setup(rules))
    cold(replica, Request(1, PROMPT[: 2 * SIZE], 1))
    gone = [replica.submit(Request(2 + index, PROMPT, 9)) for index in range(2)]
    for _ in range(num_turns):
        replica.step()
    for request in gone:
        replica.executor.cancel(request.request_id)
    replica.settle()
    assert all(request.finish_reason for request in gone)
    replica.executor.blocks.evict_all()
    replica.run(Request(9, PROMPT, 2))
    finish_after_expiry(replica)


@IN_ALL_LOOPS
@pytest.mark.parametrize("num_turns", [1, 3])
def test_a_forward_pass_that_fails_stores_nothing_wrong(rules: Rules, num_turns: int) -> None:
    rules = replace(rules, enable_chunked_prefill=True, max_num_tokens=16)
    replica = Replica(Site(), Setup(rules))
    for index in range(2):
        replica.submit(Request(1 + index, other_prompt(index), 9))
    for _ in range(num_turns):
        replica.step()
    replica.executor.fails_next_pass = True
    replica.settle()
    assert replica.executor.num_failed_passes == 1
    replica.executor.blocks.evict_all()
    again = [Request(5 + index, other_prompt(index), 9) for index in range(2)]
    replica.run(*again)
    assert [len(request.generated) for request in again] == [9, 9]
    finish_after_expiry(replica)


@IN_ALL_LOOPS
@pytest.mark.parametrize("num_turns", range(2, 2 + SIZE))
def test_what_waits_to_be_saved_when_a_pass_fails(rules: Rules, num_turns: int) -> None:
    """The pass that fails would have completed a block: that one holds anything but its KV."""
    replica = Replica(Site(), Setup(rules, saves_per_turn=0))
    replica.submit(Request(1, PROMPT, 4 * SIZE))
    for _ in range(num_turns):
        replica.step()
    replica.executor.fails_next_pass = True
    replica.settle()
    assert replica.executor.num_failed_passes == 1
    cold(replica, Request(2, other_prompt(2), 2))
    again = Request(3, PROMPT, 4 * SIZE)
    cold(replica, again)
    assert again.num_promised_tokens == 9 * SIZE
    finish_after_expiry(replica)


@pytest.mark.parametrize("finish_rule", ["P1", "P2"])
def test_a_request_that_ends_while_the_device_still_loads_for_it(finish_rule: Any) -> None:
    """Its blocks are reusable from then on, so the load has to be right, though nobody waits."""
    rules = Rules(overlap=True, lags=True, finish_rule=finish_rule)
    replica = Replica(Site(), Setup(rules, STAGES_IN_MATCH, is_squeezed=True))
    cold(replica, Request(1, PROMPT, 2))
    replica.submit(Request(2, other_prompt(2), 20))
    for _ in range(3):
        replica.step()
    gone = replica.submit(Request(3, PROMPT, 5))
    replica.executor.cancel(3)
    replica.step()  # matched, launched and cancelled in one turn
    assert (gone.num_promised_tokens, gone.finish_reason) == (9 * SIZE, "cancelled")
    reused = Request(4, PROMPT, 5)
    replica.run(reused)
    assert reused.num_device_tokens == 9 * SIZE
    finish_after_expiry(replica)


def finish_after_expiry(replica: Replica) -> None:
    """State of a request whose end nobody told of goes by its age, with its leases."""
    clock = FakeClock()
    clock.now_s = 1e9
    replica.scheduler._ledger._clock = clock
    for number in range(2 * EXPIRE_TURNS):
        replica.run(Request(1_000_000 + number, (5,), 1))
    finish(replica)


def test_aborts_that_nobody_tells_of_leave_nothing_behind() -> None:
    replica = Replica(Site(), Setup(Rules(finish_rule="P2")))
    for number in range(20):
        request = replica.submit(Request(number, other_prompt(number), 9))
        replica.step()
        replica.executor.cancel(request.request_id)
        replica.step()
    assert replica.executor.manager.calls["request_finished"] == 0
    assert replica.scheduler.num_tracked_requests == 20
    finish_after_expiry(replica)


@pytest.mark.parametrize("forgets", [False, True], ids=["1.2", "later"])
@IN_ALL_LOOPS
def test_an_id_that_comes_again(rules: Rules, forgets: bool) -> None:
    """On 1.2 it is never new again: its report has differences to a request long gone."""
    replica = Replica(Site(), Setup(rules))
    cold(replica, Request(1, PROMPT, 2), Request(2, other_prompt(1), 2))
    for prompt in (PROMPT, other_prompt(1), PROMPT[: 5 * SIZE], other_prompt(2)):
        if forgets:
            for rank in replica.executor.manager.ranks:
                rank.reporter.forget(1)
        again = Request(1, prompt, 3)
        cold(replica, again)
        assert len(again.generated) == 3
    finish(replica)


def test_the_reporter_never_forgets_on_1_2() -> None:
    """What the test before relies on."""
    replica = Replica(Site())
    for _ in range(2):
        replica.run(Request(1, PROMPT[:6], 1))
    first, second = replica.executor.manager.outputs
    assert [len(first.new_requests), len(second.new_requests)] == [1, 0]
    assert second.cached_requests[0].new_tokens == []
    replica.close()
