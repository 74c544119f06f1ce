"""Who waits for a run is woken when it is decided how much of it arrives, and not before."""

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
