"""Many copies in few calls of the driver, and what is done where it has no such call."""

from types import SimpleNamespace
from typing import Any

import pytest

from shared_cache.connector import batched
from shared_cache.connector.batched import COPIES_AT_ONCE, BatchedCopies

STREAM: Any = SimpleNamespace(cuda_stream=7)
COPIES = [(index, 1000 + index, 8) for index in range(2 * COPIES_AT_ONCE + 3)]


class Runtime:
    """`cuda.bindings.runtime` as far as it is used; its copies end with the codes in `results`."""

    cudaMemcpySrcAccessOrder = SimpleNamespace(cudaMemcpySrcAccessOrderStream=1)

    def __init__(self, *results: int) -> None:
        self.results = list(results)
        self.enqueued: list[tuple[int, int, int]] = []

    def cudaMemcpyAttributes(self) -> Any:
        return SimpleNamespace()

    def cudaMemcpyBatchAsync(
        self, to: Any, sources: Any, sizes: Any, count: int, *rest: Any
    ) -> tuple[int]:
        assert len(to) == len(sources) == len(sizes) == count <= COPIES_AT_ONCE
        assert rest[-1] == STREAM.cuda_stream
        self.enqueued += zip(to, sources, sizes, strict=True)
        return (self.results.pop(0) if self.results else 0,)


def copies_with(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> BatchedCopies:
    monkeypatch.setattr(batched, "runtime", runtime)
    return BatchedCopies()


def test_all_are_enqueued_in_order_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    copies = copies_with(monkeypatch, runtime)
    assert copies.enqueue(COPIES, STREAM)
    assert runtime.enqueued == COPIES
    assert copies.enqueue([], STREAM)


@pytest.mark.parametrize("results", [(801,), (0, 801)])
def test_a_driver_that_refuses_is_not_asked_again(
    results: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(*results)
    copies = copies_with(monkeypatch, runtime)
    assert not copies.enqueue(COPIES, STREAM)
    num_asked = len(runtime.enqueued)
    assert not copies.enqueue(COPIES, STREAM)
    assert len(runtime.enqueued) == num_asked


def test_without_the_drivers_library_there_is_nothing_to_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not copies_with(monkeypatch, None).enqueue(COPIES, STREAM)
