"""The connector's decisions as lists of events in, decisions out; TensorRT-LLM's own sequences."""

import pickle
from array import array
from collections.abc import Iterable, Sequence

import pytest

from shared_cache.connector.interface import RequestData
from shared_cache.connector.plan import (
    EXPIRE_S,
    EXPIRE_TURNS,
    RequestLedger,
)
from shared_cache.connector.requests import Prompt
from shared_cache.connector.transfers import Load, SaveRun, TransferPlan, pack_loads
from shared_cache.hashing import BlockHash, BlockHashChain
from shared_cache.host.interface import HostLease, Place
from shared_cache.prefix_cache import StagedPrefix
from tests.shared_cache.fakes import FakeClock

SIZE = 32


class Driver:
    """Speaks to a ledger as an engine and a scheduler would; block ids are 100, 101, ..."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = RequestLedger(self.clock)
        self.released: list[HostLease] = []
        self._next_lease = 1

    def match(self, id_: int, num_tokens: int, device: int = 0, host: int = 0) -> int:
        """`device` tokens on the device; the first `host` blocks in host memory (slots 7, 8, ...).

        Of these, the lease covers those behind the device's.
        """
        lease = HostLease(self._next_lease, tuple(range(7 + device // SIZE, 7 + host)))
        self._next_lease += 1
        return self.ledger.matched(id_, prompt(num_tokens), device, StagedPrefix(lease))

    def turn(
        self, new: Iterable[RequestData] = (), cached: Iterable[RequestData] = ()
    ) -> TransferPlan:
        new, cached = list(new), list(cached)
        loads = [
            Load([place(planned.lease.lease)], planned.device_blocks)
            for planned in self.ledger.begin_turn(new, cached)
        ]
        reports = [(report, True) for report in new] + [(report, False) for report in cached]
        saves = [self.ledger.take_save(report, is_new) for report, is_new in reports]
        self.released += [staged.lease for staged in self.ledger.take_released()]
        return TransferPlan(pack_loads(loads), tuple(run for run in saves if run is not None))

    def idle_turns(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.turn()

    def finish(self, id_: int) -> None:
        self.ledger.forget(id_)
        self.released += [staged.lease for staged in self.ledger.take_released()]


def place(lease: HostLease) -> Place:
    return Place(b"", array("I", lease.slots))


def loaded(plan: TransferPlan, rank: int = 0) -> list[tuple[int, int]]:
    """(slot, device block) of every load."""
    pairs: list[tuple[int, int]] = []
    for load in plan.loads_of(rank):
        pairs += zip(load.place.slots, load.device_blocks, strict=True)
    return pairs


def prompt(num_tokens: int) -> Prompt:
    return Prompt(range(num_tokens), chain(num_tokens))


def chain(num_tokens: int) -> BlockHashChain:
    return BlockHashChain(SIZE, tokens=range(num_tokens))


def first(id_: int, num_tokens: int, position: int, scheduled: int, start: int = 0) -> RequestData:
    """The first report: the whole prompt and all its blocks."""
    num_blocks = -(-num_tokens // SIZE)
    blocks = list(range(100 + start, 100 + start + num_blocks))
    return RequestData(id_, list(range(num_tokens)), blocks, position, scheduled)


def later(
    id_: int,
    position: int,
    scheduled: int = 1,
    tokens: Sequence[int] = (),
    blocks: Sequence[int] = (),
) -> RequestData:
    return RequestData(id_, list(tokens), list(blocks), position, scheduled)


def saved(plan: TransferPlan) -> list[tuple[int, BlockHash]]:
    """(device block, hash) of every save, after checking that runs are chained."""
    pairs: list[tuple[int, BlockHash]] = []
    for run in plan.saves:
        pairs += zip(run.device_blocks, run.hashes, strict=True)
    return pairs


def expected(num_tokens: int, start: int, stop: int) -> list[tuple[int, BlockHash]]:
    hashes = chain(num_tokens).hashes
    return [(100 + index, hashes[index]) for index in range(start, stop)]


# What to promise


@pytest.mark.parametrize(
    ("num_tokens", "device", "host", "promised"),
    [
        (100, 0, 0, 0),
        (100, 0, 2, 64),
        (100, 0, 3, 96),
        (96, 0, 3, 64),  # a full-prompt hit leaves the last block to compute
        (97, 0, 3, 96),
        (96, 64, 3, 0),
        (100, 32, 3, 64),  # the device's blocks are not loaded again
        (100, 96, 3, 0),
        (100, 64, 1, 0),
        (100, 40, 3, 0),  # unaligned: partial reuse on the device
        (32, 0, 1, 0),
        (1, 0, 0, 0),
        (0, 0, 0, 0),
    ],
)
def test_whole_blocks_are_promised_and_a_token_is_left_to_compute(
    num_tokens: int, device: int, host: int, promised: int
) -> None:
    driver = Driver()
    assert driver.match(1, num_tokens, device, host) == promised
    driver.released += [staged.lease for staged in driver.ledger.take_released()]
    assert len(driver.released) == (0 if promised else 1)


# What to load


def test_promised_blocks_are_loaded_once_behind_those_on_the_device() -> None:
    driver = Driver()
    assert driver.match(1, 200, device=64, host=5) == 96
    plan = driver.turn([first(1, 200, position=64, scheduled=40)])
    assert loaded(plan) == [(9, 102), (10, 103), (11, 104)]
    assert loaded(driver.turn(cached=[later(1, 200)])) == []


def test_the_lease_of_a_load_ends_two_turns_later() -> None:
    driver = Driver()
    driver.match(1, 200, host=5)
    driver.turn([first(1, 200, 0, 40)])
    driver.turn(cached=[later(1, 200)])
    assert driver.released == []
    driver.turn(cached=[later(1, 201)])
    assert [lease.lease_id for lease in driver.released] == [1]


def test_finishing_ends_the_lease_of_an_earlier_turns_load_but_not_of_this_turns() -> None:
    """Within the turn an abort may come while the copy is still under way."""
    driver = Driver()
    driver.match(1, 200, host=5)
    driver.turn([first(1, 200, 0, 40)])
    driver.finish(1)
    assert driver.released == []
    driver.match(2, 200, host=5)
    driver.turn([first(2, 200, 0, 40)])
    driver.turn()
    assert [lease.lease_id for lease in driver.released] == [1]
    driver.finish(2)
    assert [lease.lease_id for lease in driver.released] == [1, 2]
    assert len(driver.ledger) == 0


def test_an_engine_that_allocates_too_little_for_a_promise_is_stopped() -> None:
    driver = Driver()
    driver.match(1, 200, host=5)
    with pytest.raises(ValueError, match="5 blocks of prefix are promised, the engine allocated 2"):
        driver.turn([RequestData(1, list(range(200)), [100, 101], 0, 40)])


# What to save


def test_chunked_prefill_saves_only_what_is_computed() -> None:
    """256 tokens in chunks of 128: everything is reported first, half of it is computed."""
    driver = Driver()
    driver.match(1, 256)
    assert saved(driver.turn([first(1, 256, 0, 128)])) == expected(256, 0, 4)
    assert saved(driver.turn(cached=[later(1, 128, 128)])) == expected(256, 4, 8)
    assert saved(driver.turn(cached=[later(1, 256)])) == []


def test_a_chunk_that_ends_inside_a_block_leaves_that_block_for_the_next() -> None:
    driver = Driver()
    driver.match(1, 100)
    assert saved(driver.turn([first(1, 100, 0, 50)])) == expected(100, 0, 1)
    assert saved(driver.turn(cached=[later(1, 50, 50)])) == expected(100, 1, 3)


@pytest.mark.parametrize("lag", [0, 1])
def test_generated_blocks_are_saved_when_full(lag: int) -> None:
    """48 prompt and 32 generated tokens, as upstream's test; with `lag` as the overlap loop."""
    driver = Driver()
    driver.match(1, 48)
    turns = [driver.turn([first(1, 48, 0, 48)])]
    for step in range(31 + lag):
        num_known = 48 + step + 1 - lag
        tokens = [num_known - 1] if step + 1 > lag else []
        blocks = [100 + num_known // SIZE] if tokens and num_known % SIZE == 1 else []
        turns.append(driver.turn(cached=[later(1, num_known - 1, 1, tokens, blocks)]))
    assert [saved(turn) for turn in turns if turn.saves] == [
        expected(80, 0, 1),
        expected(80, 1, 2),
    ]
    full_at = next(index for index, turn in enumerate(turns) if index and turn.saves)
    assert full_at == 16 + lag


def test_drafted_tokens_that_are_not_confirmed_save_nothing() -> None:
    """A turn that computes ten drafts beyond the known tokens completes no known block."""
    driver = Driver()
    driver.match(1, 60)
    driver.turn([first(1, 60, 0, 60)])
    assert saved(driver.turn(cached=[later(1, 60, 11, [60], [])])) == []
    assert saved(driver.turn(cached=[later(1, 63, 11, [61, 62, 63], [102])])) == expected(64, 1, 2)


def test_what_was_found_or_loaded_is_not_saved_again() -> None:
    driver = Driver()
    assert driver.match(1, 200, device=64, host=4) == 64
    assert saved(driver.turn([first(1, 200, 64, 72)])) == expected(200, 4, 6)


def test_a_block_computed_again_only_for_its_last_token_is_not_saved_again() -> None:
    driver = Driver()
    assert driver.match(1, 96, host=3) == 64
    assert saved(driver.turn([first(1, 96, 0, 32)])) == []


def test_host_blocks_behind_the_devices_need_no_beginning_in_host_memory() -> None:
    """The lease begins at block 2; blocks 0 and 1 are on the device alone."""
    driver = Driver()
    lease = HostLease(1, (30, 31))
    assert driver.ledger.matched(1, prompt(200), 64, StagedPrefix(lease)) == 64
    plan = driver.turn([first(1, 200, position=64, scheduled=72)])
    assert loaded(plan) == [(30, 102), (31, 103)]
    assert saved(plan) == expected(200, 4, 6)


def test_an_unaligned_device_match_saves_from_the_block_it_ends_in() -> None:
    """That block is whole after the pass; without it, those behind it could never be matched."""
    driver = Driver()
    assert driver.match(1, 128, device=40) == 0
    assert saved(driver.turn([first(1, 128, 40, 88)])) == expected(128, 1, 4)


def test_runs_of_several_requests_carry_their_own_parents() -> None:
    driver = Driver()
    driver.match(1, 64)
    driver.match(2, 160, device=64)
    plan = driver.turn([first(1, 64, 0, 64), first(2, 160, 64, 96, start=50)])
    one, two = plan.saves
    assert one.parent == chain(0).parent_of(0)
    assert one.hashes == tuple(chain(64).hashes)
    assert two.parent == chain(160).hashes[1]
    assert list(two.device_blocks) == [152, 153, 154]


# Requests that misbehave


def test_requests_we_were_never_asked_about_are_ignored() -> None:
    driver = Driver()
    plan = driver.turn([first(9, 64, 0, 64)], [later(8, 64)])
    assert plan == TransferPlan()
    driver.finish(7)
    assert driver.released == []


def test_a_request_matched_again_starts_anew() -> None:
    driver = Driver()
    driver.match(1, 200, host=5)
    driver.match(1, 64)
    plan = driver.turn([first(1, 64, 0, 64)])
    assert loaded(plan) == []
    assert saved(plan) == expected(64, 0, 2)
    assert [lease.lease_id for lease in driver.released] == [1, 2]
    assert len(driver.ledger) == 1


@pytest.mark.parametrize("replay_as_new", [True, False])
def test_a_report_out_of_order_ends_saving_as_its_tokens_are_in_doubt(replay_as_new: bool) -> None:
    driver = Driver()
    driver.match(1, 64)
    if replay_as_new:
        driver.turn([first(1, 64, 0, 32)])
        plan = driver.turn([first(1, 64, 32, 32)])
    else:
        plan = driver.turn(cached=[later(1, 64, 64, range(64), [100, 101])])
    assert plan == TransferPlan()
    assert len(driver.ledger) == 0


def test_a_vanished_request_expires_after_turns_and_time() -> None:
    driver = Driver()
    driver.match(1, 200, host=5)
    driver.match(2, 200)
    driver.turn([first(2, 200, 0, 200)])
    driver.idle_turns(2 * EXPIRE_TURNS)
    assert len(driver.ledger) == 2
    driver.clock.now_s += EXPIRE_S
    driver.turn(cached=[later(2, 200)])
    driver.idle_turns(EXPIRE_TURNS)
    assert len(driver.ledger) == 1
    assert [lease.lease_id for lease in driver.released] == [2, 1]
    driver.finish(2)
    assert len(driver.ledger) == 0


# The wire


def test_the_plan_of_the_longest_prompts_is_small_and_survives_pickling() -> None:
    """A 128k-token prompt: all of it loaded but the last chunk of 8k tokens, which is saved."""
    driver = Driver()
    num_tokens = 128 * 1024
    num_loaded = (num_tokens - 8192) // SIZE
    assert driver.match(1, num_tokens, host=num_loaded) == num_loaded * SIZE
    plan = driver.turn([first(1, num_tokens, 0, 8192)])
    assert (len(loaded(plan)), len(saved(plan))) == (num_loaded, 256)
    wire = pickle.dumps(plan)
    assert len(wire) < 64 * 1024
    assert pickle.loads(wire) == plan
    assert saved(pickle.loads(wire)) == expected(num_tokens, num_loaded, num_tokens // SIZE)


def test_an_empty_plan_is_tiny() -> None:
    assert len(pickle.dumps(TransferPlan())) < 200
    assert loaded(TransferPlan()) == []
    assert SaveRun(chain(0).parent_of(0), b"", b"").hashes == ()
