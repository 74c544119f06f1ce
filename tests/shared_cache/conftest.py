"""Fixtures for all tests of the cache."""

from collections.abc import Iterator

import pytest

from shared_cache import parallel
from shared_cache.threads import IoThreads
from tests.shared_cache.fakes import WAIT_S


@pytest.fixture
def one_helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs of a batch run in two threads, however many cores this machine has."""
    threads = IoThreads(1, "test-helper")
    monkeypatch.setattr(parallel, "_num_helpers", lambda: 1)
    monkeypatch.setattr(parallel, "_helpers", lambda process_id, num_threads, name: threads)
    yield
    assert threads.close(WAIT_S)
