"""What becomes of promises when an engine says what it should not: never a wrong load."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.connector.interface import RequestData, SchedulerOutput
from shared_cache.connector.plan import EXPIRE_S, EXPIRE_TURNS
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.transfers import TransferPlan
from shared_cache.hashing import BlockHashChain
from tests.shared_cache.fakes import FakeClock
from tests.shared_cache.mini_engine import MiniRequest
from tests.shared_cache.scripted_cache import ScriptedCache
from tests.shared_cache.test_plan_wire import loads_of

SIZE = 4
TOKENS = list(range(30))
BLOCKS = list(range(100, 108))
NUM_HERE = 5


class Engine:
    """A scheduler over a cache that has the first five blocks of every prompt, in slots 0 to 4."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.cache = ScriptedCache(num_here=NUM_HERE)
        self.scheduler = SharedCacheScheduler(self.cache, SIZE, clock=self.clock)

    def match(self, id_: int = 1, tokens: list[int] = TOKENS) -> int:
        return self.scheduler.get_num_new_matched_tokens(MiniRequest(id_, tokens), 0)[0]

    def turn(self, new: list[RequestData], cached: list[RequestData]) -> TransferPlan:
        return self.scheduler.build_connector_meta(SchedulerOutput(new, cached))

    def idle_turns(self, num_turns: int) -> None:
        for _ in range(num_turns):
            assert self.turn([], []) == TransferPlan()


def report(
    id_: int = 1, tokens: list[int] = TOKENS, blocks: list[int] = BLOCKS, position: int = 0
) -> RequestData:
    return RequestData(id_, tokens, blocks, position, len(TOKENS) - NUM_HERE * SIZE)


EXPECTED = {100 + index: index for index in range(NUM_HERE)}


def test_loads_go_to_the_blocks_that_were_allocated() -> None:
    engine = Engine()
    assert engine.match() == NUM_HERE * SIZE
    engine.scheduler.update_state_after_alloc(MiniRequest(1, TOKENS), BLOCKS)
    assert loads_of(engine.turn([report()], []), 0) == EXPECTED


def test_a_request_whose_id_the_engine_has_seen_before_gets_what_it_was_promised() -> None:
    """It is reported as an old one then, with differences to that; its blocks are known all the
    same. Nothing of it is saved, as its tokens are not told."""
    engine = Engine()
    engine.match()
    engine.scheduler.update_state_after_alloc(MiniRequest(1, TOKENS), BLOCKS)
    plan = engine.turn([], [report(tokens=[7], blocks=[])])
    assert (loads_of(plan, 0), plan.saves, plan.refusal) == (EXPECTED, (), "")
    engine.idle_turns(3)
    assert engine.cache.leases == {}


@pytest.mark.parametrize(
    ("new", "cached"),
    [
        ([report(blocks=BLOCKS[:3])], []),
        ([], [report()]),
        ([report(tokens=TOKENS[1:])], []),
        ([report(tokens=TOKENS[:-1])], []),
    ],
    ids=["too few blocks", "never new", "other tokens", "fewer tokens"],
)
def test_a_promise_that_cannot_be_kept_stops_the_turn_on_every_rank(
    new: list[RequestData], cached: list[RequestData]
) -> None:
    engine = Engine()
    engine.match()
    plan = engine.turn(new, cached)
    assert plan.refusal.startswith("ValueError: request 1")
    assert plan == TransferPlan(refusal=plan.refusal)
    assert engine.scheduler.connector_faults == 1


def test_a_promise_that_has_expired_stops_the_turn_should_the_request_come_after_all() -> None:
    engine = Engine()
    engine.match()
    engine.clock.now_s += EXPIRE_S
    engine.idle_turns(EXPIRE_TURNS)
    assert (engine.scheduler.num_tracked_requests, engine.cache.leases) == (0, {})
    assert "too late" in engine.turn([report()], []).refusal
    engine.match()
    assert loads_of(engine.turn([report()], []), 0) == EXPECTED


def test_a_request_that_was_not_promised_anything_is_only_not_saved() -> None:
    engine = Engine()
    engine.cache.num_here = 0
    assert engine.match() == 0
    assert engine.turn([report(tokens=TOKENS[::-1])], []) == TransferPlan()
    assert (engine.scheduler.connector_faults, engine.scheduler.num_tracked_requests) == (1, 0)


def test_one_report_that_makes_no_sense_does_not_keep_others_from_being_saved() -> None:
    engine = Engine()
    engine.cache.num_here = 0
    for id_ in (1, 2, 3):
        engine.match(id_)
    reports = [report(1), report(2, tokens=[*TOKENS, -1]), report(3)]
    plan = engine.turn(reports, [])
    chain = BlockHashChain(SIZE, tokens=TOKENS)
    assert [run.hashes for run in plan.saves] == [tuple(chain.hashes[:2])] * 2
    assert engine.scheduler.connector_faults == 1
    assert engine.scheduler.num_tracked_requests == 2


def test_a_match_that_fails_forgets_a_vanished_request_of_that_id() -> None:
    """Else its tokens would name the blocks of the new one."""
    engine = Engine()
    engine.match()
    assert engine.match(tokens=[-1] * 30) == 0
    assert engine.turn([report(tokens=[-1] * 30)], []) == TransferPlan()
    assert engine.cache.leases == {}


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from("mmaarrrcft")), max_size=60))
def test_whatever_the_engine_does_every_lease_ends_and_no_call_raises(
    events: list[tuple[int, str]],
) -> None:
    """Match, allocate, report as new or cached, finish, turn: in any order, for four ids."""
    engine = Engine()
    new: list[RequestData] = []
    cached: list[RequestData] = []
    for id_, event in events:
        request = MiniRequest(id_, TOKENS)
        if event == "m":
            engine.match(id_)
        elif event == "a":
            engine.scheduler.update_state_after_alloc(request, BLOCKS)
        elif event == "r":
            new.append(report(id_))
        elif event == "c":
            cached.append(report(id_, tokens=[1], blocks=[], position=30))
        elif event == "f":
            engine.scheduler.request_finished(request, BLOCKS)
        else:
            engine.turn(new, cached)
            new, cached = [], []
    engine.clock.now_s += EXPIRE_S
    engine.idle_turns(2 * EXPIRE_TURNS)
    assert (engine.scheduler.num_tracked_requests, engine.cache.leases) == (0, {})
