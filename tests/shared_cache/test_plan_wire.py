"""The plan that is broadcast every turn: small for the longest prompt, on any number of ranks."""

import pickle
import time
from array import array
from collections.abc import Sequence
from unittest.mock import Mock

import numpy as np
import pytest

from shared_cache.connector.interface import RequestData, SchedulerOutput
from shared_cache.connector.save_runs import RUN_ROOM
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.transfers import (
    MAX_SAVES,
    MIN_SAVES,
    Load,
    TransferPlan,
    num_saves_beside,
    pack_loads,
)
from shared_cache.hashing import BlockHash, block_hashes
from shared_cache.host.interface import Place
from shared_cache.pacing import TurnBudget
from tests.shared_cache.mini_engine import MiniRequest
from tests.shared_cache.scripted_cache import ScriptedCache

SIZE = 32
NUM_TOKENS = 128 * 1024
NUM_BLOCKS = NUM_TOKENS // SIZE
CHUNK = 8192
MAX_WIRE_BYTES = 64 * 1024
TOKENS = list(range(NUM_TOKENS))


def slots_of(arrangement: str, num_ranks: int) -> list[list[int]]:
    """Where a long prompt's blocks lie on each rank, of an arena with 16,384 slots for each."""
    draw = np.random.default_rng(num_ranks)
    if arrangement == "in a row":
        return [list(range(100 * rank, 100 * rank + NUM_BLOCKS)) for rank in range(num_ranks)]
    if arrangement == "in runs":  # of 64, each wherever there was room
        runs = [draw.permutation(256)[: NUM_BLOCKS // 64] for _ in range(num_ranks)]
        return [(ones[:, None] * 64 + np.arange(64)).ravel().tolist() for ones in runs]
    return [draw.permutation(16_384)[:NUM_BLOCKS].tolist() for _ in range(num_ranks)]


def turn(
    scheduler: SharedCacheScheduler,
    new: Sequence[RequestData] = (),
    cached: Sequence[RequestData] = (),
) -> TransferPlan:
    """One turn's plan as another rank gets it, after checking that it is small."""
    wire = pickle.dumps(scheduler.build_connector_meta(SchedulerOutput(list(new), list(cached))))
    assert len(wire) < MAX_WIRE_BYTES
    plan = pickle.loads(wire)
    assert isinstance(plan, TransferPlan)
    assert not plan.refusal
    return plan


def loads_of(plan: TransferPlan, rank: int) -> dict[int, int]:
    """Slot by device block."""
    pairs: dict[int, int] = {}
    for load in plan.loads_of(rank):
        pairs |= zip(load.device_blocks, load.place.slots, strict=True)
    return pairs


def saves_of(plan: TransferPlan) -> dict[int, BlockHash]:
    pairs: dict[int, BlockHash] = {}
    for run in (*plan.early_saves, *plan.saves):
        pairs |= zip(run.device_blocks, run.hashes, strict=True)
    return pairs


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("arrangement", ["in a row", "in runs", "scattered"])
def test_the_plans_of_the_longest_prompt_are_small(arrangement: str, num_ranks: int) -> None:
    """All of it is loaded but the last chunk, which is saved, some turns later where it must."""
    slots = slots_of(arrangement, num_ranks)
    num_loaded = (NUM_TOKENS - CHUNK) // SIZE
    scheduler = SharedCacheScheduler(ScriptedCache(slots, num_loaded), SIZE)
    device = np.random.default_rng(99).permutation(16_384)[:NUM_BLOCKS].tolist()
    request = MiniRequest(1, TOKENS)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (num_loaded * SIZE, False)
    scheduler.update_state_after_alloc(request, device)
    plan = turn(scheduler, [RequestData(1, TOKENS, device, 0, CHUNK)])
    for rank in range(num_ranks):
        expected = dict(zip(device[:num_loaded], slots[rank][:num_loaded], strict=True))
        assert loads_of(plan, rank) == expected
    saved = saves_of(plan)
    assert len(saved) >= MIN_SAVES
    while len(saved) < NUM_BLOCKS - num_loaded:
        more = saves_of(turn(scheduler, cached=[RequestData(1, [], [], NUM_TOKENS, 1)]))
        assert more
        saved |= more
    hashes = block_hashes(TOKENS, SIZE)
    assert saved == dict(zip(device[num_loaded:], hashes[num_loaded:], strict=True))
    assert scheduler.connector_faults == 0


def test_a_long_prompt_that_is_computed_at_once_is_saved_in_several_turns() -> None:
    scheduler = SharedCacheScheduler(ScriptedCache(), SIZE)
    device = list(range(NUM_BLOCKS))
    scheduler.get_num_new_matched_tokens(MiniRequest(1, TOKENS), 0)
    later = RequestData(1, [], [], NUM_TOKENS, 1)
    plans = [turn(scheduler, [RequestData(1, TOKENS, device, 0, NUM_TOKENS)])]
    plans += [turn(scheduler, cached=[later]) for _ in range(3)]
    assert [len(saves_of(plan)) for plan in plans] == [MAX_SAVES] * 4


def test_what_an_ended_request_leaves_is_small_too_and_the_rest_is_lost_and_counted() -> None:
    cache = ScriptedCache()
    scheduler = SharedCacheScheduler(cache, SIZE)
    request, device = MiniRequest(1, TOKENS), list(range(NUM_BLOCKS))
    scheduler.get_num_new_matched_tokens(request, 0)
    turn(scheduler, [RequestData(1, TOKENS, device, 0, NUM_TOKENS)])
    turn(scheduler, cached=[RequestData(1, [], [], NUM_TOKENS, 1)])
    scheduler.request_finished(request, device)
    other = MiniRequest(2, TOKENS)
    scheduler.get_num_new_matched_tokens(other, 0)
    plan = turn(scheduler, [RequestData(2, TOKENS, device, 0, NUM_TOKENS)])
    num_early = MAX_SAVES - RUN_ROOM
    assert sum(run.num_blocks for run in plan.early_saves) == num_early
    assert sum(run.num_blocks for run in plan.saves) <= MIN_SAVES
    assert cache.num_lost == NUM_BLOCKS - 2 * MAX_SAVES - num_early


class NothingYet(TurnBudget):
    """Nothing may be saved in any turn."""

    def begin_turn(self, is_decoding: bool) -> int | None:
        return 0


@pytest.mark.parametrize("num_ended", [1, 1000])
def test_what_ended_requests_leave_has_room_beside_scattered_loads_or_is_lost(
    num_ended: int,
) -> None:
    """A thousand blocks of one request, or of a thousand, in the turn that loads a long prompt."""
    draw = np.random.default_rng(5)
    cache = ScriptedCache([draw.permutation(1 << 18)[:NUM_BLOCKS].tolist()], NUM_BLOCKS - 1)
    scheduler = SharedCacheScheduler(cache, SIZE)
    ended, reports = [], []
    for id_ in range(num_ended):
        tokens = list(range(id_ * SIZE, id_ * SIZE + 1000 // num_ended * SIZE))
        ended.append(MiniRequest(id_, tokens, cache_salt="not here"))
        cache.num_here = 0
        scheduler.get_num_new_matched_tokens(ended[-1], 0)
        blocks = list(range(len(tokens) // SIZE))
        reports.append(RequestData(id_, tokens, blocks, 0, len(tokens)))
    cache.turn_budget = NothingYet(1.0)
    turn(scheduler, reports)
    waiting = [RequestData(id_, [], [], len(one.tokens), 0) for id_, one in enumerate(ended)]
    turn(scheduler, cached=waiting)
    for request in ended:
        scheduler.request_finished(request, [])
    cache.num_here = NUM_BLOCKS - 1
    device = draw.permutation(1 << 16)[:NUM_BLOCKS].tolist()
    long = MiniRequest(10_000, TOKENS)
    assert scheduler.get_num_new_matched_tokens(long, 0) == ((NUM_BLOCKS - 1) * SIZE, False)
    plan = turn(scheduler, [RequestData(10_000, TOKENS, device, 0, SIZE)])
    assert len(loads_of(plan, 0)) == NUM_BLOCKS - 1
    num_early = sum(run.num_blocks for run in plan.early_saves)
    assert num_early > 0
    assert cache.num_lost == 1000 - num_early
    assert scheduler.connector_faults == 0


def test_many_short_runs_are_small_too() -> None:
    """A thousand prompts of one block each, all computed in one turn."""
    scheduler = SharedCacheScheduler(ScriptedCache(), SIZE)
    reports = []
    for id_ in range(1000):
        tokens = [id_] * SIZE
        scheduler.get_num_new_matched_tokens(MiniRequest(id_, tokens, cache_salt=f"{id_}"), 0)
        reports.append(RequestData(id_, tokens, [id_], 0, SIZE))
    saved = saves_of(turn(scheduler, reports))
    while len(saved) < 1000:
        again = [RequestData(id_, [], [], SIZE, 0) for id_ in range(1000)]
        more = saves_of(turn(scheduler, cached=again))
        assert more
        saved |= more
    assert set(saved) == set(range(1000))


def test_loads_leave_at_least_some_room_for_saves() -> None:
    draw = np.random.default_rng(0)
    places = [
        Place(b"", array("I", draw.permutation(1 << 20)[:NUM_BLOCKS].tolist())) for _ in "8 ranks"
    ]
    full = pack_loads([Load(places, draw.permutation(NUM_BLOCKS).tolist())])
    assert num_saves_beside(full) == MIN_SAVES
    assert num_saves_beside(()) == MAX_SAVES


def test_requests_of_one_turn_share_a_part_unless_their_memory_differs() -> None:
    def load(memories: tuple[bytes, bytes], start: int) -> Load:
        slots = array("I", range(start, start + 5))
        return Load([Place(memory, slots) for memory in memories], range(start + 100, start + 103))

    parts = pack_loads([load((b"a", b"a"), 0), load((b"a", b"b"), 10), load((b"a", b"a"), 20)])
    assert [part.memories for part in parts] == [(b"a", b"a"), (b"a", b"b")]
    plan = TransferPlan(parts)
    expected = {start + 100 + i: start + i for start in (0, 10, 20) for i in range(3)}
    assert loads_of(plan, 0) == loads_of(plan, 1) == expected
    assert [part.place.memory for part in plan.loads_of(1)] == [b"a", b"b"]


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_a_plan_that_is_not_sent_says_the_same_and_is_not_packed(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [Place(b"", array("I", one)) for one in slots_of("scattered", num_ranks)]
    device = np.random.default_rng(3).permutation(NUM_BLOCKS).tolist()
    more = range(1 << 20, (1 << 20) + 9)
    plan = TransferPlan(pack_loads([Load(places, device), Load(places, more)]))
    sent = pickle.loads(pickle.dumps(plan))
    for rank in range(num_ranks):
        assert loads_of(sent, rank) == loads_of(plan, rank)
    short = pack_loads([Load(places, device[:300])])
    packed = Mock(side_effect=AssertionError("it was packed"))
    monkeypatch.setattr("shared_cache.connector.transfers.pack", packed)
    assert num_saves_beside(short) == MAX_SAVES
    assert loads_of(TransferPlan(short), num_ranks - 1)


def test_an_empty_plan_is_tiny() -> None:
    assert len(pickle.dumps(TransferPlan())) < 200
    assert TransferPlan().loads_of(7) == []


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_planning_the_longest_load_takes_milliseconds(num_ranks: int) -> None:
    """About 3 ms on one rank and 8 ms on eight, of an idle core; the copies take a second."""
    slots = slots_of("scattered", num_ranks)
    places = [Place(b"", array("I", one)) for one in slots]
    loads = [Load(places, list(range(NUM_BLOCKS)))]
    pickle.dumps(pack_loads(loads))
    taken_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        pickle.dumps(pack_loads(loads))
        taken_s.append(time.perf_counter() - start_s)
    print(f"planned {NUM_BLOCKS} loads on {num_ranks} ranks in {1e3 * min(taken_s):.1f} ms")
    assert min(taken_s) < 0.2
