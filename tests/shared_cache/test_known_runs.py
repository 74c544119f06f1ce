"""What a process remembers of a store: hints that never outlive what they were read from."""

from shared_cache.hashing import BlockHashChain
from shared_cache.stores.codec import RunHead
from shared_cache.stores.known_runs import RUN_COST_BLOCKS, KnownRuns
from tests.shared_cache.fakes import chain_of


def head_of(chain: BlockHashChain, start: int = 0, stop: int = 9) -> RunHead:
    hashes = tuple(chain.hashes[start:stop])
    return RunHead(chain.parent_of(start), hashes, tuple(range(len(hashes))), 4096)


def test_every_block_is_found_in_its_row() -> None:
    known, chain = KnownRuns(), chain_of(4)
    known.add("a", head_of(chain))
    for row, block_hash in enumerate(chain.hashes):
        place = known.find(block_hash)
        assert place is not None
        assert (place.name, place.row) == ("a", row)
        assert place.num_common(chain.hashes[row:]) == 4 - row
        assert place.num_common([*chain.hashes[row : row + 1], block_hash]) == 1
    assert known.find(chain_of(1, first_token=50).hashes[0]) is None


def test_a_newer_head_replaces_all_of_the_older_one() -> None:
    known, chain = KnownRuns(), chain_of(4)
    known.add("a", head_of(chain))
    known.add("a", head_of(chain, stop=2))
    assert known.find(chain.hashes[1])
    assert known.find(chain.hashes[2]) is None


def test_forgetting_one_run_leaves_what_another_one_holds() -> None:
    known, chain = KnownRuns(), chain_of(4)
    known.add("a", head_of(chain))
    known.add("b", head_of(chain, start=2))
    known.forget("a")
    assert known.find(chain.hashes[0]) is None
    place = known.find(chain.hashes[3])
    assert place is not None
    assert (place.name, place.row) == ("b", 1)
    known.forget("b")
    known.forget("a")
    assert known.find(chain.hashes[3]) is None


def test_the_oldest_runs_are_forgotten_when_there_are_too_many_blocks() -> None:
    """Runs of any length: what takes memory is bounded, not how many runs there are."""
    known = KnownRuns(max_blocks=2 * (4 + RUN_COST_BLOCKS))
    chains = [chain_of(4, first_token=100 * i) for i in range(4)]
    for index, chain in enumerate(chains):
        known.add(str(index), head_of(chain))
    assert [known.find(chain.hashes[1]) is not None for chain in chains] == [
        False,
        False,
        True,
        True,
    ]
    known.add("3", head_of(chains[3]))  # again: it counts once
    assert known.find(chains[2].hashes[0])
    long = chain_of(9, first_token=900)
    known.add("long", head_of(long))
    assert known.find(chains[2].hashes[0]) is None
    assert known.find(chains[3].hashes[0]) is None
    assert known.find(long.hashes[8])


def test_the_newest_run_is_kept_even_if_it_is_longer_than_the_limit() -> None:
    known, long = KnownRuns(max_blocks=3), chain_of(9)
    known.add("long", head_of(long))
    assert known.find(long.hashes[8])
    known.add("short", head_of(chain_of(1, first_token=500)))
    assert known.find(long.hashes[8]) is None


def test_it_says_how_much_it_knows_and_when_it_is_full() -> None:
    known, chain = KnownRuns(max_blocks=2 * (4 + RUN_COST_BLOCKS)), chain_of(4)
    known.add("a", head_of(chain))
    assert (known.num_blocks, known.is_full) == (4, False)
    assert known.names() == {"a"}
    known.add("b", head_of(chain_of(4, first_token=50)))
    assert (known.num_blocks, known.is_full) == (8, True)
    known.forget("a")
    assert (known.num_blocks, known.is_full, known.names()) == (4, False, {"b"})
