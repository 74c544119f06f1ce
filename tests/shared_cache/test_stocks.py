"""Slots reserved ahead: they hold no block, so those of idle clients must not fill the arena."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from shared_cache.config import HostConfig
from shared_cache.host.holdings import Stock
from shared_cache.host.interface import HostStats
from shared_cache.host.stocks import StockShares, allowance_of
from tests.shared_cache.arenas import (
    await_true,
    bring,
    hashes_of,
    host_config,
    memory_folder,
    open_tier,
    running_owner,
)
from tests.shared_cache.fakes import FakeClock

NUM_SLOTS = 256


@pytest.fixture
def config() -> Iterator[HostConfig]:
    with memory_folder() as folder, running_owner(host_config(folder)):
        yield host_config(folder)


@dataclass
class Shares:
    """The shares of a namespace of `NUM_SLOTS` slots of which `num_free` are free."""

    num_free: int

    def __post_init__(self) -> None:
        self.shares = StockShares()

    def ask(self, client: str, num_slots: int, num_had: int = 0) -> tuple[int, int]:
        stats = HostStats(NUM_SLOTS, self.num_free, 0, 0, 0, 0, 4096)
        num_given, share = self.shares.ask(client, num_slots, num_had, stats)
        self.shares.granted(client, num_given)
        return num_given, share


def test_eight_idle_clients_leave_the_cached_blocks_alone(config: HostConfig) -> None:
    hashes = [hashes_of(f"cached {number}", 50) for number in range(5)]
    with open_tier(config) as first, ExitStack() as stack:
        for run in hashes:
            first.release(bring(first, run))
        used_before = first.stats().used_slots
        assert used_before > NUM_SLOTS * 3 // 4, "the arena is full"
        idle = [stack.enter_context(open_tier(config)) for _ in range(8)]

        def is_shared() -> bool:
            return all(0 < len(tier._session.stock) <= NUM_SLOTS // 8 // 9 for tier in idle)

        await_true(is_shared)
        stats = first.stats()
        assert stats.reserved_slots <= NUM_SLOTS // 8
        assert stats.used_slots >= used_before - NUM_SLOTS // 8
        assert len(first.claim(hashes_of("wanted", 8)).slots) == 8


def test_a_client_alone_has_the_whole_allowance() -> None:
    assert Shares(0).ask("one", 99) == (32, 32)


def test_nothing_is_evicted_for_a_newcomer_until_the_others_gave_back() -> None:
    full = Shares(0)
    assert full.ask("one", 32) == (32, 32)
    assert full.ask("two", 16) == (0, 16)
    assert full.ask("one", 0, 16) == (0, 16)
    assert full.ask("two", 16) == (16, 16)


def test_free_slots_go_to_a_newcomer_at_once() -> None:
    half_empty = Shares(100)
    half_empty.ask("one", 32)
    assert half_empty.ask("two", 32) == (16, 16)


def test_what_a_client_that_has_gone_had_is_the_others_again() -> None:
    full = Shares(0)
    full.ask("one", 32)
    full.ask("two", 16)
    full.shares.forget("one")
    assert full.ask("two", 32) == (32, 32)


@pytest.mark.parametrize(
    ("num_slots", "num_clients", "allowance"),
    [(256, 1, 32), (256, 8, 32), (8, 3, 3), (8, 9, 4), (1, 5, 1), (0, 1, 1)],
)
def test_small_arenas_have_one_slot_for_each_client_up_to_half(
    num_slots: int, num_clients: int, allowance: int
) -> None:
    assert allowance_of(num_slots, num_clients) == allowance


def test_a_stock_shrinks_to_its_share_and_reports_what_it_gave_back() -> None:
    clock = FakeClock()
    stock = Stock(64, clock)
    stock.limit(32)
    assert stock.ask() == 32
    stock.add(range(32))
    assert not stock.is_to_report(), "it has just asked"
    stock.allow(4)
    assert len(stock.surplus()) == 28
    assert stock.is_to_report()
    assert not stock.is_to_report(), "one report is on the way"
    stock.add(())
    stock.allow(8)
    assert stock.ask() == 4, "a larger share is used at once"


def test_a_stock_that_got_too_little_does_not_ask_again_at_once() -> None:
    clock = FakeClock()
    stock = Stock(64, clock)
    stock.limit(32)
    assert stock.ask() == 32
    stock.add(())
    assert stock.ask() == 0
    clock.now_s += 0.2
    assert stock.ask() == 32
