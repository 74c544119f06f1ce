"""Our connector under the double's executor, in every loop that TensorRT-LLM has.

Each test would fail with a `WrongBytesError`, a dead loop or a lease that nobody ends; what it
asserts besides is that something was loaded at all.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.trtllm_runtime.cold import IN_ALL_LOOPS, PROMPT, cold, finish, other_prompt
from tests.trtllm_runtime.replica import STAGED_HERE, STAGES_IN_MATCH, Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.site import Site


@IN_ALL_LOOPS
@pytest.mark.parametrize("chunk", [None, 8, 12, 24])
def test_another_replica_loads_what_the_first_computed(rules: Rules, chunk: int | None) -> None:
    if chunk is not None:
        rules = replace(rules, enable_chunked_prefill=True, max_num_tokens=chunk, max_batch_size=4)
    site = Site()
    first, second = Replica(site, Setup(rules)), Replica(site, Setup(rules))
    answer, again = Request(1, PROMPT, 9), Request(1, PROMPT, 9)
    first.run(answer)
    first.check_quiet()
    second.run(again)
    assert again.num_promised_tokens == 9 * SIZE
    assert again.generated == answer.generated
    assert site.check() == (len(PROMPT) + 9 - 1) // SIZE, "generated blocks are stored too"
    finish(first, second)


@IN_ALL_LOOPS
@pytest.mark.parametrize("match", [STAGED_HERE, STAGES_IN_MATCH], ids=["staged-ahead", "in-match"])
def test_both_ways_to_stage_load_the_same(rules: Rules, match: Any) -> None:
    site = Site()
    first = Replica(site, Setup(rules))
    cold(first, Request(1, PROMPT, 2))
    first.check_quiet()
    second = Replica(site, Setup(rules, match))
    staged = second.submit_staged(Request(2, PROMPT, 2))
    second.run()
    assert staged.num_promised_tokens == 9 * SIZE
    finish(first, second)


@IN_ALL_LOOPS
def test_the_next_turn_of_a_conversation_loads_the_answer_too(rules: Rules) -> None:
    replica = Replica(Site(), Setup(rules))
    first = Request(1, PROMPT, 3 * SIZE)
    cold(replica, first)
    second = Request(2, (*first.tokens, 1, 2, 3), 2)
    cold(replica, second)
    num_shown = len(PROMPT) + 3 * SIZE - (2 if rules.overlap else 1)
    assert second.num_promised_tokens >= num_shown // SIZE * SIZE
    finish(replica)


@IN_ALL_LOOPS
def test_a_prompt_that_is_there_as_a_whole_keeps_a_token_to_compute(rules: Rules) -> None:
    replica = Replica(Site(), Setup(rules))
    whole = PROMPT[: 4 * SIZE]
    again = Request(2, whole, 2)
    cold(replica, Request(1, whole, 2), again)
    assert again.num_promised_tokens == 3 * SIZE
    finish(replica)


@IN_ALL_LOOPS
def test_what_was_loaded_is_reused_on_the_device_afterwards(rules: Rules) -> None:
    replica = Replica(Site(), Setup(rules))
    loaded, reused = Request(2, PROMPT, 2), Request(3, PROMPT, 2)
    cold(replica, Request(1, PROMPT, 2))
    replica.run(loaded)
    replica.run(reused)
    assert (loaded.num_device_tokens, loaded.num_promised_tokens) == (0, 9 * SIZE)
    assert (reused.num_device_tokens, reused.num_promised_tokens) == (9 * SIZE, 0)
    finish(replica)


@IN_ALL_LOOPS
def test_the_device_has_the_head_and_the_cache_the_tail(rules: Rules) -> None:
    replica = Replica(Site(), Setup(rules))
    cold(replica, Request(1, PROMPT, 2))
    head = Request(2, (*PROMPT[: 3 * SIZE], 77, 78), 1)
    replica.run(head)
    both = Request(3, PROMPT, 2)
    replica.run(both)
    assert (both.num_device_tokens, both.num_promised_tokens) == (3 * SIZE, 6 * SIZE)
    finish(replica)


@IN_ALL_LOOPS
def test_requests_of_one_prefix_in_one_batch(rules: Rules) -> None:
    replica = Replica(Site(), Setup(rules))
    cold(replica, Request(1, PROMPT, 2))
    together = [Request(2 + index, (*PROMPT, index), 3) for index in range(4)]
    replica.run(*together)
    assert sum(request.num_promised_tokens for request in together) >= 9 * SIZE
    finish(replica)


@IN_ALL_LOOPS
@pytest.mark.parametrize("saves_per_turn", [None, 0, 1])
def test_partial_matches_on_the_device(rules: Rules, saves_per_turn: int | None) -> None:
    """`enable_partial_reuse` is to be off; should it be on, nothing wrong comes of it."""
    rules = replace(rules, partial_reuse=True, newest_first=True, num_blocks=14, max_batch_size=2)
    replica = Replica(Site(), Setup(rules, num_slots=256, saves_per_turn=saves_per_turn))
    cold(replica, Request(1, PROMPT, 2))
    for number in range(2, 30):
        cut = number % 9 * SIZE + number % 3 + 1
        pair = [Request(100 * number + i, (*PROMPT[:cut], number, i), 5) for i in range(2)]
        for request in pair:
            replica.submit(request)
        for _ in range(6):
            replica.step()
    replica.run()
    replica.executor.blocks.evict_all()
    for number in range(2, 30):
        cut = number % 9 * SIZE + number % 3 + 1
        cold(replica, Request(10_000 + number, (*PROMPT[:cut], number, 0), 5))
    finish(replica)


@IN_ALL_LOOPS
@pytest.mark.parametrize("saves_per_turn", [0, 1])
def test_saves_that_wait_until_their_request_has_ended(rules: Rules, saves_per_turn: int) -> None:
    rules = replace(rules, newest_first=True, num_blocks=26, max_batch_size=2)
    replica = Replica(Site(), Setup(rules, num_slots=256, saves_per_turn=saves_per_turn))
    for number in range(12):
        replica.submit(Request(number, other_prompt(number % 4), 5 + number % 3))
        replica.step()
    replica.run()
    replica.executor.blocks.evict_all()
    again = [Request(100 + number, other_prompt(number), 7) for number in range(4)]
    cold(replica, *again)
    assert sum(request.num_promised_tokens for request in again) > 0
    finish(replica)
