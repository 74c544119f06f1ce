"""Block hashes are the protocol between replicas: they may never change by accident."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.hashing import BlockHashChain, ReuseScope, block_hashes, common_prefix_len

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "block_hashes.json").read_text())

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
block_sizes = st.integers(1, 9)
scopes = st.builds(
    ReuseScope,
    cache_salt=st.none() | st.text(max_size=3),
    lora_id=st.none() | st.text(max_size=3),
)


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda vector: vector["name"])
def test_golden_vectors(vector: dict) -> None:  # type: ignore[type-arg]
    scope = ReuseScope(vector["cache_salt"], vector["lora_id"])
    assert scope.root_hash().hex() == vector["root"]
    hashes = block_hashes(vector["tokens"], vector["tokens_per_block"], scope)
    assert [h.hex() for h in hashes] == vector["hashes"]


@given(st.lists(tokens, max_size=6), block_sizes, scopes)
def test_piece_by_piece_is_as_at_once(
    pieces: list[list[int]], tokens_per_block: int, scope: ReuseScope
) -> None:
    chain = BlockHashChain(tokens_per_block, scope)
    for piece in pieces:
        chain.extend(piece)
    flat = [token for piece in pieces for token in piece]
    assert chain.hashes == block_hashes(flat, tokens_per_block, scope)
    assert chain.num_tokens == len(flat)
    assert len(chain.hashes) == len(flat) // tokens_per_block


@given(tokens, tokens, tokens, block_sizes)
def test_hashes_are_equal_just_as_far_as_the_tokens_are(
    shared: list[int], left: list[int], right: list[int], tokens_per_block: int
) -> None:
    one, other = shared + left, shared + right
    num_equal = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    common = common_prefix_len(
        block_hashes(one, tokens_per_block), block_hashes(other, tokens_per_block)
    )
    assert common == num_equal // tokens_per_block


@given(scopes, scopes, st.lists(st.integers(0, 9), min_size=4, max_size=8))
def test_different_scopes_share_nothing(
    one: ReuseScope, other: ReuseScope, prompt: list[int]
) -> None:
    shared = set(block_hashes(prompt, 2, one)) & set(block_hashes(prompt, 2, other))
    assert bool(shared) == (one == other)


def test_a_salt_is_not_an_adapter() -> None:
    assert ReuseScope(cache_salt="a").root_hash() != ReuseScope(lora_id="a").root_hash()
    assert ReuseScope(cache_salt="").root_hash() != ReuseScope().root_hash()
    assert ReuseScope("ab", "c").root_hash() != ReuseScope("a", "bc").root_hash()


def test_parents_chain_from_the_root() -> None:
    scope = ReuseScope("tenant")
    chain = BlockHashChain(2, scope, range(6))
    assert [chain.parent_of(i) for i in range(3)] == [scope.root_hash(), *chain.hashes[:2]]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_does_not_fit_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes([token], 1)


def test_blocks_of_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_block"):
        BlockHashChain(0)
