"""An engine whose store hangs closes within one deadline, and does not wait twice for its saves."""

import threading
import time

import pytest

from actors.engines.torch import connector
from actors.engines.torch.connector import ConnectorDriver
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import Gate, ScriptedStore, chain_of, make_cache, save_blocks


@pytest.fixture
def gate() -> Gate:
    return Gate()


def hanging_cache(gate: Gate) -> SharedCache:
    store = ScriptedStore()
    store.on_write = gate
    cache = make_cache(store)
    save_blocks(cache, chain_of(4), 0, 4)
    gate.wait_entered()
    return cache


def closed_after_s(cache: SharedCache) -> float:
    driver = ConnectorDriver(object(), object(), cache)  # type: ignore[arg-type]
    before_s = time.monotonic()
    driver.close()
    return time.monotonic() - before_s


def test_flushing_and_closing_share_one_deadline(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "_CLOSE_S", 0.6)
    monkeypatch.setattr(connector, "CLOSE_TIMEOUT_S", 0.3)
    assert 0.5 < closed_after_s(hanging_cache(gate)) < 1.5
    gate.open()


def test_after_a_drain_that_ran_out_of_time_nobody_waits_for_saves_again(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "CLOSE_TIMEOUT_S", 0.1)
    cache = hanging_cache(gate)
    assert not cache.flush(0.05)
    assert closed_after_s(cache) < 2
    gate.open()
    for thread in threading.enumerate():
        if thread.name.startswith("kvcommons-close"):
            thread.join(2)
