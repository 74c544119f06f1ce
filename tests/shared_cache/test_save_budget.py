"""Copies of new blocks keep to their part of a turn: the rest waits, or is counted as lost."""

from collections.abc import Sequence

import pytest

from shared_cache.connector.interface import RequestData
from shared_cache.connector.plan import RequestLedger
from shared_cache.connector.requests import Prompt
from shared_cache.connector.transfers import SaveRun
from shared_cache.hashing import block_hashes
from shared_cache.host.interface import HostLease
from shared_cache.prefix_cache import StagedPrefix
from tests.shared_cache.fakes import WAIT_S, FakeClock, make_cache, num_in_host
from tests.shared_cache.mini_engine import SIZE, MiniEngine, MiniRequest
from tests.shared_cache.test_plan import SIZE as BLOCK
from tests.shared_cache.test_plan import chain, first, later

NO_LEASE = HostLease(0, ())


@pytest.fixture
def ledger() -> RequestLedger:
    ledger = RequestLedger(FakeClock())
    for id_, num_tokens in ((1, 5 * BLOCK), (2, 3 * BLOCK)):
        prompt = Prompt(range(num_tokens), chain(num_tokens), b"payer")
        ledger.matched(id_, prompt, 0, StagedPrefix(NO_LEASE))
    return ledger


def take_saves(
    ledger: RequestLedger,
    new: Sequence[RequestData],
    cached: Sequence[RequestData],
    max_blocks: int | None = None,
) -> tuple[SaveRun, ...]:
    """One turn's saves, `max_blocks` of all requests together."""
    runs = []
    for is_new, reports in ((True, new), (False, cached)):
        for report in reports:
            run = ledger.take_save(report, is_new, max_blocks)
            if run is not None:
                runs.append(run)
                max_blocks = None if max_blocks is None else max_blocks - run.num_blocks
    return tuple(runs)


def places(runs: tuple[SaveRun, ...]) -> list[tuple[int, int]]:
    """Where each run begins in its request, and how long it is."""
    return [(run.first, len(run.device_blocks)) for run in runs]


def test_blocks_beyond_the_limit_wait_for_later_turns_in_order(ledger: RequestLedger) -> None:
    new = [first(1, 5 * BLOCK, 0, 5 * BLOCK), first(2, 3 * BLOCK, 0, 3 * BLOCK, start=50)]
    ledger.begin_turn(new)
    one = take_saves(ledger, new, [], max_blocks=2)
    assert places(one) == [(0, 2)]
    cached = [later(1, 5 * BLOCK), later(2, 3 * BLOCK)]
    ledger.begin_turn([])
    two = take_saves(ledger, [], cached, max_blocks=4)
    assert places(two) == [(2, 3), (0, 1)]
    assert two[0].parent == one[0].hashes[-1]
    assert list(two[0].device_blocks) == [102, 103, 104]
    ledger.begin_turn([])
    three = take_saves(ledger, [], [later(1, 5 * BLOCK + 1), later(2, 3 * BLOCK + 1)])
    assert places(three) == [(1, 2)]
    assert three[0].hashes == tuple(chain(3 * BLOCK).hashes[1:])
    assert {run.tenant for run in (*one, *two, *three)} == {b"payer"}
    for id_ in (1, 2):
        ledger.forget(id_)
    assert ledger.take_lost() == 0


def test_with_no_room_at_all_nothing_is_saved_and_nothing_forgotten(ledger: RequestLedger) -> None:
    new = [first(1, 5 * BLOCK, 0, 5 * BLOCK)]
    ledger.begin_turn(new)
    assert take_saves(ledger, new, [], max_blocks=0) == ()
    ledger.begin_turn([])
    assert places(take_saves(ledger, [], [later(1, 5 * BLOCK)])) == [(0, 5)]


def test_what_waits_when_its_request_ends_is_lost_and_told_once(ledger: RequestLedger) -> None:
    new = [first(1, 5 * BLOCK, 0, 5 * BLOCK)]
    ledger.begin_turn(new)
    take_saves(ledger, new, [], max_blocks=2)
    ledger.forget(1)
    assert (ledger.take_lost(), ledger.take_lost()) == (3, 0)


def test_what_waits_from_turns_that_went_well_is_saved_when_its_request_ends(
    ledger: RequestLedger,
) -> None:
    new = [first(1, 5 * BLOCK, 0, 3 * BLOCK)]
    ledger.begin_turn(new)
    assert places(take_saves(ledger, new, [], max_blocks=1)) == [(0, 1)]
    ledger.begin_turn([])
    rest = [later(1, 3 * BLOCK, scheduled=2 * BLOCK)]
    assert take_saves(ledger, [], rest, max_blocks=0) == ()
    ledger.finish(1)
    assert places(ledger.take_early_saves()) == [(1, 2)]
    assert ledger.take_early_saves() == ()
    assert ledger.take_lost() == 2, "nobody knows whether the last turn went well"


def test_what_was_not_computed_is_not_lost(ledger: RequestLedger) -> None:
    new = [first(1, 5 * BLOCK, 0, 2 * BLOCK + 1)]
    ledger.begin_turn(new)
    assert places(take_saves(ledger, new, [])) == [(0, 2)]
    ledger.forget(1)
    assert ledger.take_lost() == 0


def test_a_turn_decodes_when_any_request_is_behind_its_prompt(ledger: RequestLedger) -> None:
    assert not ledger.is_decoding([])
    assert not ledger.is_decoding([later(1, 4 * BLOCK), later(99, 10**6)])
    assert ledger.is_decoding([later(1, 4 * BLOCK), later(2, 3 * BLOCK)])


def test_while_others_decode_a_long_prompt_is_saved_bit_by_bit() -> None:
    """Everything is loaded right again in the end: the engine checks what it attends to."""
    cache = make_cache(None)
    engine = MiniEngine(cache)
    decoding = MiniRequest(1, list(range(500, 500 + SIZE)))
    engine.start(decoding)
    engine.turn(new=(decoding,))
    engine.turn(decoding)
    for _ in range(16):
        cache.turn_budget.saw_decode_turn(1.0)
        cache.turn_budget.saw_copies(1, 0.05)  # at most a tenth of a turn: two blocks
    prompt = list(range(8 * SIZE + 1))
    long = MiniRequest(2, list(prompt))
    engine.start(long)
    engine.turn(decoding, new=(long,))
    assert cache.flush(WAIT_S)
    saved = [num_in_host(cache, block_hashes(prompt, SIZE))]
    for _ in range(2):
        cache.turn_budget.saw_copies(16, 0.05 * 16)
        engine.turn(decoding, long)
        assert cache.flush(WAIT_S)
        saved.append(num_in_host(cache, block_hashes(prompt, SIZE)))
    assert saved[0] < saved[1] < saved[2] < 8
    engine.finish(decoding)
    engine.finish(long)
    assert cache.stats().dropped_saves == 0
    engine.turn()
    assert cache.flush(WAIT_S)
    again = MiniRequest(3, list(prompt))
    assert engine.run(again) == 8 * SIZE, "the rest was saved before anything wrote there"
    assert engine.scheduler.connector_faults == 0
    cache.close()
