"""The thread that sends canaries: when a cluster counts as sharing, and what ends a round."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from actors.canary import CanaryReport
from actors.findings import Finding
from cluster import canaries
from cluster.config import ClusterConfig
from cluster.driver import Cluster
from cluster.figures import canary_figures

PATIENCE_S = 20.0
GOOD = CanaryReport((), (Finding("store of a", "ok", ""),), 100.0, 0.5)
BAD = CanaryReport((), (Finding("store of a", "fail", "unreachable store: gone"),), 100.0, 0.5)


class Rounds:
    """What the rounds show, one after the other; a round without an entry waits for one."""

    def __init__(self) -> None:
        self.results: list[CanaryReport | Exception] = []
        self.num_begun = 0
        self._more = threading.Semaphore(0)

    def add(self, result: CanaryReport | Exception) -> None:
        self.results.append(result)
        self._more.release()

    async def __call__(self, names):
        self._more.acquire()
        self.num_begun += 1
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def rounds(monkeypatch):
    rounds = Rounds()
    monkeypatch.setattr(canaries, "try_cluster", rounds)
    return rounds


@pytest.fixture
def thread(rounds):
    thread = canaries.Canaries(lambda: ["a"], period_s=3600.0)
    yield thread
    rounds.add(GOOD)  # for the round that it waits in
    thread.stop()


def eventually(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "did not come true in time"
        time.sleep(0.005)


def cluster(thread, **doctor) -> Cluster:
    """A cluster that was never started, with this thread."""
    config = ClusterConfig(model="x", cache={"store": "file:///x"}, doctor=doctor)
    made = Cluster(config, SimpleNamespace(), None, owns_ray=False)
    made._canaries = thread
    return made


def test_a_cluster_shares_from_its_first_good_round_on(rounds, thread):
    waiting = cluster(thread)
    assert "has not ended yet" in waiting.reason_not_shared()
    thread.start()
    rounds.add(BAD)
    eventually(lambda: thread.report is BAD)
    assert waiting.reason_not_shared() == "store of a: unreachable store: gone"
    thread.again()
    rounds.add(GOOD)
    eventually(lambda: thread.has_passed)
    assert waiting.reason_not_shared() is None
    thread.again()
    rounds.add(BAD)
    eventually(lambda: thread.report is BAD)
    assert waiting.reason_not_shared() is None, "an outage does not take the endpoint out"


def test_a_round_that_breaks_is_not_the_last_one(rounds, thread, caplog):
    thread.start()
    rounds.add(RuntimeError("a bug"))
    eventually(lambda: "a round of canaries failed" in caplog.text)
    thread.again()
    rounds.add(GOOD)
    eventually(lambda: thread.has_passed)


def test_a_failure_is_logged_once(rounds, thread, caplog):
    thread.start()
    for number in range(1, 3):
        rounds.add(BAD)
        eventually(lambda number=number: rounds.num_begun == number)
        thread.again()
    rounds.add(GOOD)
    eventually(lambda: thread.has_passed)
    assert caplog.text.count("unreachable store: gone") == 1


@pytest.mark.parametrize("doctor", [{"required": False}, {"period_s": None}])
def test_who_does_not_want_them_does_not_wait_for_them(thread, doctor):
    assert cluster(thread, **doctor).reason_not_shared() is None


def test_what_a_round_showed_goes_to_the_metrics():
    told = {(one.name, *dict(one.tags).values()): one.value for one in canary_figures(BAD, 130.0)}
    assert told["canary_pairs", "failed"] == told["canary_pairs", "ok"] == 0
    assert (told["canary_stores", "failed"], told["canary_stores", "ok"]) == (1, 0)
    assert told["canary_age_seconds",] == 30.0


def test_stopping_ends_a_round_and_waits_for_what_it_cleans_up(monkeypatch):
    begun, events = threading.Event(), []

    async def endless(names):
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            events.append("cleaned up")

    monkeypatch.setattr(canaries, "try_cluster", endless)
    thread = canaries.Canaries(lambda: ["a"], period_s=3600.0)
    thread.start()
    assert begun.wait(PATIENCE_S)
    thread.stop()
    assert events == ["cleaned up"]
    assert not thread._thread.is_alive()
