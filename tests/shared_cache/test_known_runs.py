"""What a process remembers of a store: hints that never outlive what they were read from."""

from shared_cache.codec import RunHead
from shared_cache.hashing import BlockHashChain
from shared_cache.known_runs import KnownRuns
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


def test_the_oldest_run_is_forgotten_first() -> None:
    known = KnownRuns(max_runs=2)
    chains = [chain_of(2, first_token=100 * i) for i in range(4)]
    for index, chain in enumerate(chains):
        known.add(str(index), head_of(chain))
    assert [known.find(chain.hashes[1]) is not None for chain in chains] == [
        False,
        False,
        True,
        True,
    ]
