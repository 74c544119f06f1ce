"""Whose blocks they are, requests that are nobody's, and too little room for all of them."""

from dataclasses import replace
from typing import Any

import pytest

from tests.trtllm_runtime.cold import IN_ALL_LOOPS, PROMPT, cold, finish, other_prompt
from tests.trtllm_runtime.replica import Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.site import Site

SCOPES: list[dict[str, Any]] = [
    {},
    {"cache_salt": "a"},
    {"cache_salt": "b"},
    {"lora_task_id": 0},
    {"lora_task_id": 1},
    {"cache_salt": "a", "lora_task_id": 1},
]


@pytest.mark.parametrize("is_later", [False, True], ids=["1.2", "later"])
@IN_ALL_LOOPS
def test_scopes_share_nothing_and_each_finds_its_own(rules: Rules, is_later: bool) -> None:
    rules = replace(rules, is_later=is_later)
    replica = Replica(Site(is_later=is_later), Setup(rules, num_slots=256))
    first = [Request(1 + index, PROMPT, 2, **scope) for index, scope in enumerate(SCOPES)]
    cold(replica, *first)
    again = [Request(50 + index, PROMPT, 2, **scope) for index, scope in enumerate(SCOPES)]
    cold(replica, *again)
    assert [request.num_promised_tokens for request in first] == [0] * len(SCOPES)
    assert [request.num_promised_tokens for request in again] == [9 * SIZE] * len(SCOPES)
    finish(replica)


@IN_ALL_LOOPS
def test_pictures_are_told_apart_or_left_alone(rules: Rules) -> None:
    replica = Replica(Site(), Setup(rules))
    pictures = [((1, 2),), ((3, 4),), None]
    cold(replica, *[Request(1 + i, PROMPT, 2, multimodal_hashes=p) for i, p in enumerate(pictures)])
    cold(replica, *[Request(9 + i, PROMPT, 2, multimodal_hashes=p) for i, p in enumerate(pictures)])
    finish(replica)


@IN_ALL_LOOPS
def test_dummy_requests_are_passed_over(rules: Rules) -> None:
    """For warm-up and padding; nobody asks for a match, but they are allocated and reported."""
    replica = Replica(Site(), Setup(rules))
    for number in range(3):
        replica.executor.submit(Request(2**40 + number, (1,) * 9, 3, is_dummy=True))
        replica.submit(Request(1 + number, PROMPT, 3))
        replica.run()
    assert replica.executor.manager.calls["get_num_new_matched_tokens"] == 3
    finish(replica)


# Too little room


@IN_ALL_LOOPS
@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_host_memory_smaller_than_a_prefix(rules: Rules, num_slots: int) -> None:
    replica = Replica(Site(), Setup(rules, num_slots=num_slots))
    again = [Request(2 + index, PROMPT, 3) for index in range(3)]
    cold(replica, Request(1, PROMPT, 3), *again)
    assert all(request.num_promised_tokens <= num_slots * SIZE for request in again)
    finish(replica)


@IN_ALL_LOOPS
def test_a_device_that_is_always_full(rules: Rules) -> None:
    """Every block is given away again at once; saves and loads must be through by then."""
    rules = replace(rules, num_blocks=13, max_batch_size=2)
    replica = Replica(Site(), Setup(rules, num_slots=128))
    numbers = [0, 1, 2, 0, 1, 2, 0, 2, 1]
    requests = [Request(1 + i, other_prompt(n), 6) for i, n in enumerate(numbers)]
    for request in requests:
        replica.run(request)
        replica.settle()
    assert sum(request.num_promised_tokens for request in requests) >= 5 * 9 * SIZE
    assert replica.executor.blocks.num_evicted > 50
    finish(replica)


def test_requests_wait_for_room_instead_of_being_evicted() -> None:
    replica = Replica(Site(), Setup(Rules(num_blocks=24, overlap=True)))
    requests = [Request(1 + i, other_prompt(i), 20) for i in range(5)]
    replica.run(*requests)
    assert [len(request.generated) for request in requests] == [20] * 5
    finish(replica)
