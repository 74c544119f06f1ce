"""From caches to the router: nobody waits for a source that is silent, or for a router that is."""

import pytest
from ray.exceptions import RayError

from cluster import event_feeds
from cluster.event_feeds import EventFeeds


class Actor:
    """Calls are noted; `answers` are what they come to, a missing one never comes."""

    def __init__(self, **answers) -> None:
        self.answers = answers
        self.log: list[tuple] = []

    def __getattr__(self, method):
        return Method(self, method)


class Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *arguments):
        self.actor.log.append((self.name, *arguments))
        return Call(self.actor, self.name)


class Call:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def answer(self):
        answer = self.actor.answers[self.name]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def feeds(monkeypatch):
    def wait(calls, **_):
        return [one for one in calls if one.name in one.actor.answers], None

    monkeypatch.setattr(event_feeds.ray, "wait", wait)
    monkeypatch.setattr(event_feeds.ray, "get", lambda call, **_: call.answer())
    router = Actor(cursors={"replica": {"device": 7}, "machine": {}})
    sources = {"replica": Actor(), "machine": Actor(cache_changes=("news",))}
    made = EventFeeds(
        router,
        lambda: {"replica": sources["replica"]},
        lambda: {name: sources[name] for name in sources if name != "replica"},
        0.01,
    )
    return made, router, sources


def learnt(router: Actor) -> list[tuple]:
    return [call for call in router.log if call[0] == "learn"]


def test_each_source_is_told_how_far_it_was_read_and_a_silent_one_is_not_asked_again(feeds):
    made, router, sources = feeds
    made.tick()
    made.tick()
    assert sources["replica"].log == [("cache_changes", {"device": 7})]
    assert sources["machine"].log == [("cache_changes", {})] * 2
    assert learnt(router) == [("learn", "machine", ("news",))] * 2
    sources["replica"].answers["cache_changes"] = ()
    made.tick()
    made.tick()
    assert len(sources["replica"].log) == 2
    assert len(learnt(router)) == 4, "nothing new is not told"


def test_errors_of_sources_and_router_are_left_to_the_next_round(feeds):
    made, router, sources = feeds
    sources["machine"].answers["cache_changes"] = RayError("it died")
    made.tick()
    assert learnt(router) == []
    cursors = router.answers.pop("cursors")
    router.answers["cursors"] = RayError("it restarts")
    made.tick()
    sources["machine"].answers["cache_changes"] = ("news",)
    router.answers["cursors"] = cursors
    made.tick()
    assert learnt(router) == [("learn", "machine", ("news",))]


def test_a_machine_that_left_is_forgotten_once(feeds):
    made, router, sources = feeds
    made.tick()
    del sources["machine"]
    made.tick()
    made.tick()
    assert [call for call in router.log if call[0] == "forget_machine"] == [
        ("forget_machine", "machine")
    ]
