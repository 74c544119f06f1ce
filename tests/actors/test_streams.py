"""Merging streams: order within each, errors, and closing."""

import asyncio

import pytest

from actors.streams import merge


async def counting(name: str, num_items: int, closed: list[str], error: Exception | None = None):
    try:
        for number in range(num_items):
            await asyncio.sleep(0)
            yield f"{name}{number}"
        if error is not None:
            raise error
        await asyncio.sleep(0)
    finally:
        closed.append(name)


@pytest.mark.parametrize("counts", [[3], [3, 0, 5]])
async def test_keeps_order_within_each_stream_and_ends_with_the_last(counts):
    closed: list[str] = []
    streams = [counting(chr(97 + i), count, closed) for i, count in enumerate(counts)]
    merged = [item async for item in merge(streams)]
    for index, count in enumerate(counts):
        mine = [text for i, text in merged if i == index]
        assert mine == [f"{chr(97 + index)}{number}" for number in range(count)]
    assert len(closed) == len(counts)


async def test_the_first_error_ends_all():
    closed: list[str] = []
    streams = [counting("a", 2, closed, ValueError("a bug")), counting("b", 10**6, closed)]
    seen = []

    async def read_all():
        async for index, text in merge(streams):
            seen.append((index, text))

    with pytest.raises(ValueError, match="a bug"):
        await read_all()
    assert [text for index, text in seen if index == 0] == ["a0", "a1"]
    assert sorted(closed) == ["a", "b"]


@pytest.mark.parametrize("num_streams", [1, 3])
async def test_closing_closes_all(num_streams):
    closed: list[str] = []
    merged = merge([counting(str(i), 10**6, closed) for i in range(num_streams)])
    for _ in range(2 * num_streams):
        await anext(merged)
    await merged.aclose()
    assert sorted(closed) == [str(i) for i in range(num_streams)]
