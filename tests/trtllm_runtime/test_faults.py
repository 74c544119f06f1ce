"""Tiers that fail, lie, tear and hang, and errors inside the connector: the engine notices none."""

import threading
import time
from itertools import count
from typing import Any

import pytest

from shared_cache.connector.scheduler import MatchRule
from shared_cache.errors import HostMemoryGoneError
from tests.shared_cache.arenas import await_true
from tests.shared_cache.fakes import Gate
from tests.trtllm_runtime.replica import STAGED_HERE, Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.site import Mood, Site

PROMPT = tuple(range(9 * SIZE + 3))
WAIT_S = 0.1
SLACK_S = 2.0
"""More than a thread waits for its turn on a busy machine; a store's timeout is 30 s."""

BOTH_LOOPS = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])


def stored_site() -> Site:
    """A site whose store has the prompt."""
    site = Site()
    replica = Replica(site)
    replica.run(Request(1, PROMPT, 2))
    replica.check_quiet()
    replica.close()
    return site


def setup(overlap: bool, **settings: Any) -> Setup:
    match = MatchRule(staged_ahead=False, wait_s=WAIT_S)
    return Setup(Rules(overlap=overlap), **{"match": match, "deadline_s": WAIT_S, **settings})


@BOTH_LOOPS
@pytest.mark.parametrize("staged", [False, True], ids=["in-match", "staged-ahead"])
@pytest.mark.parametrize("mood", [one for one in Mood if one is not Mood.FINE])
def test_a_store_in_any_mood(mood: Mood, staged: bool, overlap: bool) -> None:
    site = stored_site()
    rule = {"match": STAGED_HERE} if staged else {}
    replica = Replica(site, setup(overlap, **rule))
    site.weather.change(mood)
    request = Request(1, PROMPT, 3)
    start_s = time.monotonic()
    (replica.submit_staged if staged else replica.submit)(request)
    replica.run()
    assert time.monotonic() - start_s < WAIT_S + SLACK_S
    if mood in (Mood.FAILS, Mood.HANGS):
        assert request.num_promised_tokens == 0
    assert len(request.generated) == 3
    site.weather.change(Mood.FINE)
    site.clock.now_s += 3600.0
    replica.check_quiet()
    site.check()
    replica.close()


@BOTH_LOOPS
def test_a_store_that_hangs_stalls_the_loop_once_and_not_for_long(overlap: bool) -> None:
    site = stored_site()
    replica = Replica(site, setup(overlap))
    site.weather.change(Mood.HANGS)
    start_s = time.monotonic()
    for number in range(20):
        replica.run(Request(1 + number, (*PROMPT[: 5 * SIZE], number), 1))
    assert time.monotonic() - start_s < WAIT_S + SLACK_S
    site.weather.change(Mood.FINE)
    replica.check_quiet()
    replica.close()


@BOTH_LOOPS
def test_a_look_up_that_comes_too_late_keeps_nothing(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the arena does not answer in time; the loop goes on without it."""
    replica = Replica(Site(), setup(overlap))
    numbers = count(10)

    def serve() -> Request:
        request = Request(next(numbers), PROMPT, 2)
        replica.run(request)
        replica.settle()
        replica.executor.blocks.evict_all()
        return request

    await_true(lambda: serve().num_promised_tokens == 9 * SIZE)  # the first thread comes slowly
    cache, gate = replica.caches[0], Gate()
    lease, late = cache.lease, threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        gate()
        staged = lease(*args, **options)
        assert staged.num_blocks == 9
        late.set()
        return staged

    with monkeypatch.context() as patch:
        patch.setattr(cache, "lease", slow)
        request = Request(2, PROMPT, 2)
        replica.run(request)
        gate.open()
        assert late.wait(WAIT_S + SLACK_S)
    assert request.num_promised_tokens == 0
    await_true(lambda: cache.stats().host.leased_slots == 0)
    replica.check_quiet()
    replica.close()


@BOTH_LOOPS
@pytest.mark.parametrize("when", ["get_num_new_matched_tokens", "update_state_after_alloc"])
def test_what_was_promised_is_loaded_though_it_is_gone_everywhere_else(
    when: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the promise and the load the store loses it, and others want all of host memory."""
    site = stored_site()
    replica = Replica(site, setup(overlap, num_slots=12, match=MatchRule(False, SLACK_S)))
    hook = getattr(replica.scheduler, when)

    def hook_and_lose(*args: Any) -> Any:
        answer = hook(*args)
        for medium in site.media:
            medium._blocks.clear()
        site.weather.change(Mood.FAILS)
        replica.squeeze_host()
        return answer

    monkeypatch.setattr(replica.scheduler, when, hook_and_lose)
    request = Request(1, PROMPT, 3)
    replica.run(request)
    assert request.num_promised_tokens == 9 * SIZE
    site.weather.change(Mood.FINE)
    replica.check_quiet()
    replica.close()


# Errors where nobody expects them


def fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("a mistake of ours")


@BOTH_LOOPS
@pytest.mark.parametrize(
    "method",
    ["lease", "lease_held", "grow", "can_fetch", "release", "reserve", "save", "give_back", "lose"],
)
def test_an_error_in_the_cache_costs_hits_and_nothing_else(
    method: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = stored_site()
    replica = Replica(site, setup(overlap))
    with monkeypatch.context() as patch:
        patch.setattr(replica.caches[0], method, fails)
        for number in range(3):
            replica.run(Request(1 + number, (*PROMPT, number), 5))
    for stream in replica.executor.streams:
        stream.drain()
    site.learn(replica.requests)
    site.check()
    replica.close()


@BOTH_LOOPS
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_promise_that_cannot_be_kept_ends_the_engine_before_its_pass(
    tp_size: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one thing worse than an engine that ends is one that goes on with garbage."""
    site = Site(tp_size)
    replica = Replica(site, setup(overlap))
    replica.run(Request(1, PROMPT, 1))
    replica.settle()
    replica.executor.blocks.evict_all()

    def gone(*_: Any) -> Any:
        raise HostMemoryGoneError("somebody deleted the arena")

    monkeypatch.setattr(replica.cache, "places", gone)
    replica.submit(Request(2, PROMPT, 3))
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        replica.run()
    assert replica.executor.manager.calls["wait_for_save"] == replica.executor.num_turns - 1 - (
        1 if overlap else 0
    )
    replica.close()
