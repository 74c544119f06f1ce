"""What a watcher makes of signs of life: answers and silences in, actions out."""

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.replica_health import ReplicaHealth
from actors.router_messages import ReplicaInfo
from cluster.config import LifecycleConfig
from cluster.watch import RESTART_PAUSE_S, ReplicaWatch, Watcher

LIFECYCLE = LifecycleConfig(silence_timeout_s=10, restart_timeout_s=60)


def health(boot_id="1", state="ready"):
    return ReplicaHealth("replica-0", boot_id, 123, state, device_tokens=7, machine="m")


def verbs(actions):
    return [(action.verb, action.boot_id) for action in actions]


@pytest.fixture
def watch():
    return ReplicaWatch(LIFECYCLE, 0.0)


def test_a_ready_replica_is_registered_with_its_size_at_every_answer(watch):
    for now_s in (1, 2):
        (action,) = watch.on_health(health(), now_s)
        assert (action.verb, action.boot_id) == ("register", "1")
        assert action.info == ReplicaInfo("replica-0", "1", "m", 7)


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


class Actor:
    """A handle whose methods give what they were asked, and a list of that."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *args: self.calls.append((method, *args)) or method)


class RayWithout:
    """Stands for Ray, where every answer is this error; notes who was killed."""

    def __init__(self, error):
        self.error = error
        self.killed = []

    def wait(self, calls, num_returns, timeout):
        return calls, []

    def get(self, call):
        raise self.error

    def kill(self, handle, no_restart):
        self.killed.append(no_restart)


@pytest.mark.parametrize(
    ("error", "is_restarted"),
    [(RayTaskError("health", "trace", ValueError("odd")), True), (RayActorError(), False)],
)
def test_a_replica_whose_health_raises_is_restarted_as_a_silent_one(
    monkeypatch, error, is_restarted
):
    without, router, replica, now_s = RayWithout(error), Actor(), Actor(), [0.0]
    monkeypatch.setattr("cluster.watch.ray", without)
    monkeypatch.setattr("cluster.watch.time.monotonic", lambda: now_s[0])
    watcher = Watcher(router, lambda: {"r": replica}, LIFECYCLE)
    for now_s[0] in range(0, 60, 5):
        watcher.tick()
    assert (without.killed, router.calls[-1]) == ([], ("mark_dead", "r", ""))
    now_s[0] = 60
    watcher.tick()
    assert without.killed == ([False] if is_restarted else []), "Ray restarts what has ended"


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
    watcher = Watcher(None, dict, LifecycleConfig(health_period_s=0.01), work["also"])
    monkeypatch.setattr(watcher, "tick", work["tick"])
    watcher.start()
    try:
        assert failing.is_over.wait(10)
        assert watcher.is_alive()
    finally:
        watcher.stop()
    assert working.num_calls >= 3
    assert "a name is taken" in caplog.text
