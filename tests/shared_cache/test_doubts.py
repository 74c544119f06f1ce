"""Blocks that the engine keeps though nobody computed them: nothing behind them is ever saved."""

import time

import pytest

from shared_cache.connector.doubts import DoubtfulBlocks
from shared_cache.connector.plan import EXPIRE_S, EXPIRE_TURNS
from shared_cache.hashing import BlockHash, BlockHashChain
from tests.shared_cache.test_plan import SIZE, Driver, expected, first, later, loaded, saved

LONG, CHUNK = 8 * SIZE, 2 * SIZE
"""A prompt of eight blocks, of which two are computed in the first turn."""


def begun() -> Driver:
    """Request 1 has computed its first two blocks."""
    driver = Driver()
    driver.match(1, LONG)
    driver.turn([first(1, LONG, 0, CHUNK)])
    return driver


def saves_behind(driver: Driver, device: int, id_: int = 2) -> list[tuple[int, BlockHash]]:
    """What is saved of a longer prompt that finds so many tokens on the device."""
    driver.match(id_, LONG + SIZE, device=device)
    return saved(driver.turn([first(id_, LONG + SIZE, device, LONG + SIZE - device)]))


def leave(driver: Driver, how: str) -> None:
    if how == "finished":
        driver.ledger.finish(1, LONG)
    elif how == "forgotten":
        driver.ledger.forget(1)
    elif how == "same id":
        driver.match(1, 5)
    elif how == "expired":
        driver.clock.now_s += EXPIRE_S
        driver.idle_turns(2 * EXPIRE_TURNS)
        assert len(driver.ledger) == 0


@pytest.mark.parametrize("how", ["finished", "forgotten", "same id", "expired", "vanished"])
def test_nothing_is_saved_behind_what_a_request_left_uncomputed(how: str) -> None:
    driver = begun()
    leave(driver, how)
    assert saves_behind(driver, 7 * SIZE) == []
    assert saves_behind(driver, 7 * SIZE, id_=3) == [], "nor behind what that one computed"


def test_no_promise_is_made_behind_them_either() -> None:
    driver = begun()
    driver.ledger.finish(1, LONG)
    assert driver.match(2, LONG + SIZE, device=4 * SIZE, host=7) == 0
    assert len(driver.ledger) == 0
    assert len(driver.ledger.take_released()) == 1


def test_what_was_computed_in_turns_that_went_well_is_firm_ground() -> None:
    driver = begun()
    driver.turn(cached=[later(1, CHUNK, CHUNK)])
    driver.ledger.finish(1, LONG)
    assert saves_behind(driver, CHUNK) == expected(LONG + SIZE, 2, 9)


def test_the_last_turn_of_a_request_without_an_answer_may_have_failed() -> None:
    driver = begun()
    driver.ledger.finish(1, LONG)
    assert saves_behind(driver, CHUNK) == []


def test_a_request_that_goes_on_proves_the_turn_of_one_that_ended() -> None:
    driver = begun()
    driver.match(2, 5)
    driver.turn([first(2, 5, 0, 5)], [later(1, CHUNK, CHUNK)])
    driver.turn(cached=[later(2, 5)])
    driver.ledger.finish(1, LONG)
    assert saves_behind(driver, 4 * SIZE, id_=3) == expected(LONG + SIZE, 4, 9)


def test_an_answer_proves_the_prompt_so_conversations_go_on() -> None:
    """One pass, one token, the end; the next message begins with all of it on the device."""
    driver = Driver()
    driver.match(1, LONG)
    driver.turn([first(1, LONG, 0, LONG)])
    driver.ledger.finish(1, LONG + 1)
    assert saves_behind(driver, LONG) == expected(LONG + SIZE, 8, 9)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_prompt_that_is_being_computed_is_ground_as_long_as_it_is_reported(
    goes_on: bool,
) -> None:
    """The device's blocks may be another's; only if the first is gone may they be uncomputed."""
    driver = begun()
    assert driver.match(2, LONG + SIZE, device=4 * SIZE, host=5) == SIZE
    still = [later(1, CHUNK, CHUNK)] if goes_on else []
    plan = driver.turn([first(2, LONG + SIZE, 4 * SIZE, 4 * SIZE)], still)
    assert loaded(plan) == [(11, 104)], "a promise is kept in any case"
    of_two = [
        pair
        for run in plan.saves
        if run.first >= 5
        for pair in zip(run.device_blocks, run.hashes, strict=True)
    ]
    assert of_two == (expected(LONG + SIZE, 5, 9) if goes_on else [])
    driver.finish(2)


def test_a_prefix_that_the_engine_does_not_find_any_more_is_in_doubt_no_longer() -> None:
    driver = begun()
    driver.ledger.finish(1, LONG)
    assert saves_behind(driver, 0) == expected(LONG + SIZE, 0, 9)
    driver.ledger.finish(2, LONG + SIZE + 1)
    assert saves_behind(driver, LONG, id_=3) == expected(LONG + SIZE, 8, 9)


def test_computing_the_last_block_again_does_not_take_the_uncomputed_one_away() -> None:
    """A prompt's last token is never looked for: the block stays in the tree as it is."""
    driver = begun()
    driver.turn(cached=[later(1, CHUNK, CHUNK)])
    driver.turn(cached=[later(1, 2 * CHUNK, 1)])
    driver.ledger.finish(1, LONG)  # from block 4 on
    driver.match(2, 5 * SIZE, device=4 * SIZE)
    assert saved(driver.turn([first(2, 5 * SIZE, 4 * SIZE, SIZE)])) == expected(5 * SIZE, 4, 5)
    driver.ledger.finish(2, 5 * SIZE + 1)
    assert saves_behind(driver, 7 * SIZE, id_=3) == []


def test_a_copied_part_of_an_uncomputed_block_is_in_doubt_too() -> None:
    driver = begun()
    driver.ledger.finish(1, LONG)
    assert saves_behind(driver, SIZE // 2) == []


def test_the_longest_forgotten_go_first() -> None:
    doubts = DoubtfulBlocks(max_prefixes=2)
    chains = [BlockHashChain(SIZE, tokens=range(start, start + LONG)) for start in range(3)]
    for chain in chains[:2]:
        doubts.add(chain, 1)
    assert doubts.are_in(chains[0], LONG)  # used: the second one is older now
    doubts.add(chains[2], 1)
    assert [doubts.are_in(chain, LONG) for chain in chains] == [True, False, True]
    assert not doubts.are_in(chains[0], SIZE)
    assert len(doubts) == 2


def test_looking_for_doubts_takes_a_fraction_of_a_match() -> None:
    doubts = DoubtfulBlocks()
    for start in range(2000):
        doubts.add(BlockHashChain(SIZE, tokens=range(start, start + SIZE)), 0)
    chain = BlockHashChain(SIZE, tokens=range(5000, 5000 + 1000 * SIZE))
    taken_s = []
    for _ in range(9):
        start_s = time.perf_counter()
        assert not doubts.are_in(chain, 999 * SIZE)
        doubts.are_gone_behind(chain, 0)
        taken_s.append(time.perf_counter() - start_s)
    print(f"doubts of 1,000 blocks: {1e6 * min(taken_s):.0f} us")
    assert min(taken_s) < 0.005
