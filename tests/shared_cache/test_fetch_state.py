"""A run on its way: in which pieces it is read, and when who waits for it is woken."""

from unittest.mock import Mock

import pytest

from shared_cache.fetch_state import Fetch, InFlight
from shared_cache.hashing import DEFAULT_SCOPE
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
    chain = tuple(chain_of(num_blocks).hashes)
    fetch = Fetch(chain, 0, DEFAULT_SCOPE, deadline_s=0.0, num_prompt_tokens=0)
    fetch.sources.append((Mock(blocks_per_read=blocks_per_read), num_blocks))
    fetch.num_wanted = num_blocks
    found = []
    while (piece := fetch.next_piece(2)) is not None:
        _, start, fetch.num_submitted = piece
        fetch.saw_read(8, 32 << 20, seconds)
        found.append(fetch.num_submitted - start)
    assert found == sizes
