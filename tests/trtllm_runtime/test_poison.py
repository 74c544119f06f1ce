"""What TensorRT-LLM keeps on the device uncomputed never gets into host memory or the store."""

from dataclasses import replace

import pytest

from shared_cache.connector import plan
from tests.trtllm_runtime.cold import IN_ALL_LOOPS, PROMPT, cold, finish
from tests.trtllm_runtime.replica import Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.site import Site
from tests.trtllm_runtime.test_endings import finish_after_expiry
from tests.trtllm_runtime.world import MEDIA_TOKEN

LONG = tuple(range(20 * SIZE + 3))
MORE = LONG + tuple(range(900, 900 + 3 * SIZE))


def poisoned(rules: Rules, ends: str, num_turns: int = 1) -> Replica:
    """A replica on which one request went amid its prefill, and another has built on that."""
    rules = replace(rules, enable_chunked_prefill=True, max_num_tokens=16)
    replica = Replica(Site(), Setup(rules))
    replica.submit(Request(2, LONG, 9))
    for _ in range(num_turns):
        replica.step()
    if ends == "cancelled":
        replica.executor.cancel(2)
    else:
        replica.executor.fails_next_pass = True
    replica.settle()
    replica.run(Request(3, MORE, 2), Request(4, (*MORE, 1, 2, 3, 4, 5), 2))
    assert replica.executor.num_poisoned_passes > 0
    return replica


@IN_ALL_LOOPS
@pytest.mark.parametrize("num_turns", [1, 2])
@pytest.mark.parametrize("ends", ["cancelled", "failed"])
def test_nothing_that_was_computed_behind_uncomputed_blocks_is_saved(
    rules: Rules, ends: str, num_turns: int
) -> None:
    replica = poisoned(rules, ends, num_turns)
    replica.executor.blocks.evict_all()
    again = Request(5, MORE, 2)
    cold(replica, again)  # computed afresh, and saved
    last = Request(6, MORE, 2)
    cold(replica, last)
    assert last.num_promised_tokens == len(MORE) // SIZE * SIZE
    finish_after_expiry(replica)


@pytest.mark.parametrize("rule", ["P1", "P2"])
@pytest.mark.parametrize("ends", ["cancelled", "failed"])
def test_without_the_books_on_uncomputed_blocks_garbage_is_stored(
    rule: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests before rely on: the double would see it.

    Not in every run: which blocks are saved when is up to other threads.
    """
    monkeypatch.setattr(plan.DoubtfulBlocks, "add", lambda *_: None)
    monkeypatch.setattr(plan.Proofs, "is_firm", lambda *_: True)

    def poison_again_and_again() -> None:
        for _ in range(20):
            replica = poisoned(Rules(finish_rule=rule), ends)  # type: ignore[arg-type]
            replica.settle()
            try:
                replica.site.check()
            finally:
                replica.close()

    with pytest.raises(AssertionError, match="wrong bytes"):
        poison_again_and_again()


@IN_ALL_LOOPS
def test_a_conversation_on_the_device_is_saved_message_by_message(rules: Rules) -> None:
    replica = Replica(Site(), Setup(rules))
    tokens: tuple[int, ...] = PROMPT
    for number in range(5):
        request = Request(1 + number, tokens, 1 + number % 2 * 2)
        replica.run(request)
        assert bool(request.num_device_tokens) == bool(number)
        tokens = (*request.tokens, *range(500, 500 + SIZE))
    replica.settle()
    replica.executor.blocks.evict_all()
    last = Request(9, tokens, 1)
    replica.run(last)
    assert last.num_promised_tokens >= len(PROMPT) + 3 * SIZE
    finish(replica)


@IN_ALL_LOOPS
def test_media_without_hashes_are_told_from_each_other_and_text_before_them_is_loaded(
    rules: Rules,
) -> None:
    """The match call's object does not show them."""
    replica = Replica(Site(), Setup(rules))
    text, at = PROMPT[: 3 * SIZE], 3 * SIZE + 1
    cold(replica, Request(1, (*text, 1, 2, 3, 4), 2))
    prompt = (*text, 5, MEDIA_TOKEN, *range(700, 700 + 4 * SIZE))
    seen = [
        Request(2 + index, prompt, 2, unhashed_media=(at, name))
        for index, name in enumerate(["cat", "dog", "cat"])
    ]
    cold(replica, *seen)
    assert [request.num_promised_tokens for request in seen] == [3 * SIZE] * 3
    finish(replica)
