import pytest

from shared_cache.eviction import LruPolicy
from tests.shared_cache.fakes import chain_of


def everything(_: object) -> bool:
    return True


def test_last_block_of_a_run_goes_first() -> None:
    hashes = chain_of(3).hashes
    policy = LruPolicy()
    policy.inserted(hashes)
    assert policy.victims(3, everything) == hashes[::-1]


def test_what_was_asked_for_last_goes_last() -> None:
    old, new = chain_of(2).hashes, chain_of(2, first_token=100).hashes
    policy = LruPolicy()
    policy.inserted(old)
    policy.inserted(new)
    policy.accessed(old)
    assert policy.victims(2, everything) == new[::-1]


def test_protected_blocks_are_passed_over_and_nothing_changes() -> None:
    hashes = chain_of(4).hashes
    policy = LruPolicy()
    policy.inserted(hashes)
    protected = {hashes[3], hashes[1]}
    for _ in range(2):
        assert policy.victims(9, lambda h: h not in protected) == [hashes[2], hashes[0]]


def test_removed_blocks_are_no_victims_and_unknown_ones_are_a_bug() -> None:
    hashes = chain_of(2).hashes
    policy = LruPolicy()
    policy.inserted(hashes)
    policy.removed(hashes[1])
    assert policy.victims(2, everything) == hashes[:1]
    with pytest.raises(KeyError):
        policy.removed(hashes[1])
