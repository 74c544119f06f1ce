"""Slot numbers in few bytes: nothing is lost, and nothing takes more than it has to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.connector.packing import Numbers, pack, unpack

UINT32 = st.integers(0, 2**32 - 1)


def packed_bytes(columns: list[Numbers]) -> int:
    """What the columns take, after checking that they come back."""
    packed = pack(columns)
    back = unpack(packed, len(columns), len(columns[0]))
    assert [one.tolist() for one in back] == [one.tolist() for one in columns]
    return len(packed)


@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_any_columns_come_back(num_columns: int, num_rows: int, data: st.DataObject) -> None:
    kinds = st.one_of(st.integers(0, 3), st.integers(0, 70_000), UINT32)
    rows = st.lists(kinds, min_size=num_rows, max_size=num_rows)
    columns = data.draw(st.lists(rows, min_size=num_columns, max_size=num_columns))
    packed_bytes([np.array(column, np.uint32) for column in columns])


@given(st.lists(UINT32, min_size=600, max_size=700))
def test_long_columns_come_back(numbers: list[int]) -> None:
    column = np.array(numbers, np.uint32)
    packed_bytes([column, column[::-1].copy(), np.sort(column)])


def test_slots_in_a_row_take_next_to_nothing() -> None:
    rows = np.arange(4096, dtype=np.uint32)
    assert packed_bytes([rows, *(rows + 100_000 * rank for rank in range(8))]) < 2_000


def test_shards_that_lie_alike_take_what_one_takes() -> None:
    """Scattered by the same history, in different parts of the arena."""
    scattered = np.random.default_rng(1).permutation(16_384)[:4096].astype(np.uint32)
    one = packed_bytes([scattered])
    assert packed_bytes([scattered + 16_384 * rank for rank in range(8)]) < one + 1_000


@pytest.mark.parametrize("num_bits", [12, 14, 15])
def test_scattered_slots_take_the_bits_that_tell_them_apart(num_bits: int) -> None:
    drawn = np.random.default_rng(2).permutation(2**num_bits)[:4096].astype(np.uint32)
    assert packed_bytes([drawn]) < 4096 * num_bits / 8 * 1.03 + 100


def test_one_block_takes_a_few_bytes() -> None:
    assert packed_bytes([np.array([5], np.uint32), np.array([4_000_000_000], np.uint32)]) < 20
