"""A run on its way: in which pieces it is read, and when who waits for it is woken."""

import time
from typing import Any
from unittest.mock import Mock

import pytest

from shared_cache.fetch_state import Fetch, InFlight
from shared_cache.hashing import DEFAULT_SCOPE
from shared_cache.tiers import Tier
from tests.shared_cache.fakes import chain_of

NUM_BLOCKS, PIECE = 12, 4


@pytest.fixture
def fetch() -> Fetch:
    """A run of three pieces, of which one request wants all and another one the first six."""
    chain = tuple(chain_of(NUM_BLOCKS).hashes)
    in_flight = InFlight(Mock())
    fetch = Fetch(chain, 0, DEFAULT_SCOPE, deadline_s=0.0, num_prompt_tokens=0)
    in_flight.add(fetch)
    in_flight.ticket(chain[-1])
    in_flight.ticket(chain[5])
    fetch.num_wanted = NUM_BLOCKS
    return fetch


def test_a_piece_decides_for_those_whose_last_block_it_brings(fetch: Fetch) -> None:
    fetch.num_awaited = NUM_BLOCKS
    assert not fetch.finished(0, 4, PIECE)
    assert fetch.finished(4, 8, PIECE)
    assert fetch.finished(8, 12, PIECE)


def test_what_arrives_behind_a_gap_decides_nothing_before_the_gap_is_closed(fetch: Fetch) -> None:
    fetch.num_awaited = NUM_BLOCKS
    assert not fetch.finished(8, 12, PIECE)
    assert not fetch.finished(4, 8, PIECE)
    assert fetch.finished(0, 4, PIECE)


def test_the_last_block_that_is_awaited_decides_for_all(fetch: Fetch) -> None:
    """Of what lies behind it nothing will come."""
    fetch.num_awaited = 4
    assert fetch.finished(0, 4, PIECE)


def test_nothing_is_decided_for_who_wants_more_while_more_may_be_found(fetch: Fetch) -> None:
    assert not fetch.finished(0, 4, PIECE)
    assert fetch.finished(4, 8, PIECE)  # for who wants six


def sizes_of_pieces(
    tier: Tier, num_blocks: int, seconds: float, *, left_s: float = 1000.0, read_from: Any = None
) -> list[int]:
    """The pieces of a run that two jobs read, each told to have taken so long for 8 x 4 MiB."""
    deadline_s = time.monotonic() + left_s
    fetch = Fetch(tuple(chain_of(num_blocks).hashes), 0, DEFAULT_SCOPE, deadline_s, 0)
    fetch.sources.append((tier, num_blocks))
    fetch.num_wanted = num_blocks
    found = []
    while (piece := fetch.next_piece(2, 4 << 20)) is not None:
        _, start, fetch.num_submitted = piece
        found.append(fetch.num_submitted - start)
        fetch.saw_read(read_from or tier, 8, 32 << 20, seconds)
    return found


def test_no_more_is_read_at_a_time_than_comes_before_the_deadline() -> None:
    tier = Mock(blocks_per_read=16)
    assert max(sizes_of_pieces(tier, 255, 0.03, left_s=1.0)) == 64
    assert max(sizes_of_pieces(tier, 255, 0.03, left_s=0.2)) == 16, "256 MiB may take longer"


def test_another_tier_that_is_fast_says_nothing_of_this_one() -> None:
    tier = Mock(blocks_per_read=16)
    assert max(sizes_of_pieces(tier, 255, 0.03, read_from=Mock())) == 16


@pytest.mark.parametrize(
    ("blocks_per_read", "num_blocks", "seconds", "sizes"),
    [
        (0, 20, 1.0, [8, 8, 4]),
        (16, 20, 1.0, [8, 8, 4]),
        (16, 100, 1.0, [8, 8, 16, 16, 16, 16, 10, 8, 2]),  # two jobs share what is left
        (500, 200, 1.0, [8, 8, 32, 32, 32, 32, 28, 14, 8, 6]),
        (0, 30, 0.03, [8, 8, 8, 6]),  # fast, but it does not like long reads
        (16, 255, 0.03, [8, 8, 64, 64, 64, 32, 15]),  # whole objects
        (500, 200, 0.03, [8, 8, 64, 64, 32, 24]),
    ],
)
def test_a_tier_that_likes_long_reads_gets_them_while_all_jobs_have_something_to_do(
    blocks_per_read: int, num_blocks: int, seconds: float, sizes: list[int]
) -> None:
    """Eight blocks of 4 MiB took so long; what takes 33 ms is fast."""
    found = sizes_of_pieces(Mock(blocks_per_read=blocks_per_read), num_blocks, seconds)
    assert found == sizes
