"""What the tests of our connector in the double share."""

import pytest

from tests.trtllm_runtime.replica import Replica
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import ALL_LOOPS, SIZE, loop_name

IN_ALL_LOOPS = pytest.mark.parametrize("rules", ALL_LOOPS, ids=map(loop_name, ALL_LOOPS))
PROMPT = tuple(range(9 * SIZE + 3))


def other_prompt(number: int, num_tokens: int = len(PROMPT)) -> tuple[int, ...]:
    """Prompts that have nothing in common with each other."""
    return tuple(range(10_000 * number, 10_000 * number + num_tokens))


def cold(replica: Replica, *requests: Request) -> None:
    """Run these, each on a device that has forgotten all; what they saved is there afterwards."""
    for request in requests:
        replica.run(request)
        replica.settle()
        replica.executor.blocks.evict_all()


def finish(*replicas: Replica) -> None:
    for replica in replicas:
        replica.check_quiet()
        assert replica.scheduler.num_tracked_requests == 0
        replica.site.check()
        replica.close()
