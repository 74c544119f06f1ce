"""Heads of objects that follow: one by one where a store answers at once, else side by side."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shared_cache.stores import finding
from shared_cache.stores.fs_store import FsBlockStore, open_store
from tests.shared_cache.fakes import NAMESPACE, chain_of, run_of

CHAIN = chain_of(40)
NUM_OBJECTS = 8


class Reads:
    """Reads heads by the real function, each after so many seconds; notes by which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
        self.threads: list[int] = []
        read_head = finding.read_head

        def read(*args: Any) -> Any:
            time.sleep(seconds[min(len(self.threads), len(seconds) - 1)])
            self.threads.append(threading.get_ident())
            return read_head(*args)

        monkeypatch.setattr(finding, "read_head", read)


@pytest.fixture
def store(tmp_path: Path) -> FsBlockStore:
    """A store that has seen none of its eight objects of five blocks."""
    for start in range(0, 40, 5):
        writer = open_store(tmp_path.as_uri(), NAMESPACE)
        writer.write(run_of(CHAIN).part(start, start + 5))
        writer.close()
    return open_store(tmp_path.as_uri(), NAMESPACE)


def test_a_store_that_answers_at_once_is_asked_by_one_thread(
    store: FsBlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "AT_ONCE_S", 60.0)
    reads = Reads(monkeypatch, [0.0])
    assert store.match(CHAIN.hashes) == 40
    assert reads.threads == [threading.get_ident()] * NUM_OBJECTS


def test_one_that_takes_its_time_is_asked_by_several(
    store: FsBlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch, [0.05])
    assert store.match(CHAIN.hashes) == 40
    assert len(reads.threads) == NUM_OBJECTS
    assert len(set(reads.threads)) > 1


def test_one_that_has_some_heads_at_hand_is_asked_by_several_for_the_others(
    store: FsBlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "AT_ONCE_S", 0.04)
    reads = Reads(monkeypatch, [0.0, 0.0, 0.0, 0.0, 0.05])
    assert store.match(CHAIN.hashes) == 40
    assert reads.threads[:5] == [threading.get_ident()] * 5
    assert len(set(reads.threads)) > 1


def test_what_is_missing_is_measured_too(
    store: FsBlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.forget(CHAIN.hashes[20:])
    reads = Reads(monkeypatch, [0.05])
    assert store.match(CHAIN.hashes) == 20
    assert store._runs._probed_s >= 0.05
    assert len(set(reads.threads)) > 1
