"""What a watcher makes of signs of life: answers and silences in, actions out."""

import threading

import pytest
from ray.exceptions import RayError

from actors.engine import CacheChanges
from actors.replica import ReplicaHealth
from cluster import watch as watch_module
from cluster.config import LifecycleConfig
from cluster.watch import RESTART_PAUSE_S, ReplicaWatch, Watcher

LIFECYCLE = LifecycleConfig(silence_timeout_s=10, restart_timeout_s=60)


def health(boot_id="1", state="ready"):
    return ReplicaHealth("replica-0", boot_id, 123, state, cache_blocks=7)


def verbs(actions):
    return [(action.verb, action.boot_id) for action in actions]


@pytest.fixture
def watch():
    return ReplicaWatch(LIFECYCLE, 0.0)


def test_a_ready_replica_is_registered_with_its_size_at_every_answer(watch):
    for now_s in (1, 2):
        (action,) = watch.on_health(health(), now_s)
        assert (action.verb, action.boot_id, action.cache_blocks) == ("register", "1", 7)


def test_a_restarted_replica_replaces_the_old_process_when_it_is_ready(watch):
    watch.on_health(health("1"), 1)
    assert verbs(watch.on_loss()) == [("mark_dead", "1")]
    starting = watch.on_health(health("2", "starting"), 2)
    assert verbs(starting) == [("mark_dead", "1"), ("mark_dead", "2")]
    assert verbs(watch.on_health(health("2"), 3)) == [("register", "2")]


def test_silence_first_stops_requests_then_restarts_once(watch):
    watch.on_health(health(), 0)
    assert watch.on_silence(9) == []
    assert verbs(watch.on_silence(10)) == [("mark_dead", "1")]
    assert verbs(watch.on_silence(60)) == [("mark_dead", "1"), ("restart", "1")]
    assert watch.on_silence(61) == []


@pytest.mark.parametrize("state", ["failed", "stalled"])
def test_an_engine_that_does_not_run_is_restarted_but_not_in_a_spin(watch, state):
    assert verbs(watch.on_health(health("1", state), 1)) == [("mark_dead", "1"), ("restart", "1")]
    again = watch.on_health(health("2", state), 2)
    assert verbs(again) == [("mark_dead", "1"), ("mark_dead", "2")]
    later = watch.on_health(health("2", state), 1 + RESTART_PAUSE_S)
    assert verbs(later) == [("mark_dead", "2"), ("restart", "2")]


@pytest.mark.parametrize("state", ["starting", "draining", "closed"])
def test_a_replica_that_is_not_ready_gets_no_requests_but_is_let_be(watch, state):
    assert verbs(watch.on_health(health("1", state), 1)) == [("mark_dead", "1")]


class FakeCalls:
    """An actor whose calls are noted; they return their own number."""

    def __init__(self, log, method):
        self.log, self.method = log, method

    def remote(self, *arguments):
        self.log.append((self.method, *arguments))
        return len(self.log)


class FakeActor:
    def __init__(self):
        self.log = []

    def __getattr__(self, method):
        return FakeCalls(self.log, method)


def test_changes_go_to_the_router_once_they_have_arrived(monkeypatch):
    router, replica, ready = FakeActor(), FakeActor(), {}
    monkeypatch.setattr(
        watch_module.ray, "wait", lambda calls, **_: ([c for c in calls if c in ready], None)
    )
    monkeypatch.setattr(watch_module.ray, "get", lambda call: ready[call]())
    changes = watch_module._Changes(router, {"replica-0": replica})
    changes.ask("another", "1")
    changes.ask("replica-0", "1")
    changes.ask("replica-0", "2")  # it still owes the first answer
    changes.tell()
    assert replica.log == [("cache_changes",)]
    assert router.log == []
    told = CacheChanges(removed=(b"x",))
    ready[1] = lambda: told
    changes.tell()
    changes.tell()
    assert router.log == [("cache_changed", "replica-0", "1", told)]
    changes.ask("replica-0", "2")
    ready[2] = CacheChanges
    changes.tell()

    def fail():
        raise RayError("gone")

    changes.ask("replica-0", "2")
    ready[3] = fail
    changes.tell()
    assert len(router.log) == 1  # nothing new, and nothing at all
    assert len(replica.log) == 3


class Failing:
    """Work that fails in one way after the other, and counts how often it was asked for."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.num_calls = 0
        self.is_over = threading.Event()

    def __call__(self):
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self.is_over.set()


@pytest.mark.parametrize("which", ["tick", "also"])
def test_no_error_ends_the_watch_and_one_half_does_not_stop_the_other(monkeypatch, caplog, which):
    failing = Failing(ValueError("a name is taken"), RayError("away"), RuntimeError("odd"))
    working = Failing()
    work = {"tick": working, "also": working, which: failing}
    watcher = Watcher(None, {}, LifecycleConfig(health_period_s=0.01), work["also"])
    monkeypatch.setattr(watcher, "tick", work["tick"])
    watcher.start()
    try:
        assert failing.is_over.wait(10)
        assert watcher.is_alive()
    finally:
        watcher.stop()
    assert working.num_calls >= 3
    assert "a name is taken" in caplog.text
