"""The router's books: whatever happens in whatever order, they balance."""

import itertools
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from actors.cache_changes import ChangeLog
from actors.engine import Receipt
from actors.router import Router, RouterConfig
from actors.router_messages import (
    Batch,
    Finished,
    FirstToken,
    Lost,
    ReplicaInfo,
    RouteRequest,
    Running,
)
from actors.routing.index import routing_keys
from actors.routing.knowledge import host_of
from shared_cache.hashing import block_hashes

BLOCK = 4


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_router(shares=True, clock=None, reuses=True, **more) -> Router:
    more = {"index_blocks": 20_000, **more}
    config = RouterConfig(reservation_timeout_s=10, stream_timeout_s=100, **more)
    return Router(config, BLOCK, shares, reuses, random.Random(0), clock or Clock())


def register(router: Router, replica_id: str, boot_id: str = "1", machine: str | None = None):
    return router.register(ReplicaInfo(replica_id, boot_id, machine))


def keys_of(*tokens: int, stride: int = 1):
    return routing_keys(block_hashes(tokens, BLOCK), stride)


request_ids = itertools.count(1)


def route(router: Router, tokens: range, avoid: tuple[str, ...] = ()):
    keys = keys_of(*tokens, stride=router._config.stride(BLOCK))
    return router.route(RouteRequest(next(request_ids), len(tokens), keys, avoid))


def first_token(router: Router, request_id: int, receipt: Receipt) -> bool:
    return router.take(FirstToken(request_id, receipt))


def finished(router: Router, request_id: int, keys=()) -> bool:
    return router.take(Finished(request_id, keys))


def settle(router: Router) -> None:
    while not router.work_off():
        pass


def receipt(prompt: int, cached: int = 0) -> Receipt:
    return Receipt(prompt, cached, 0, 0, prompt - cached)


def replica(router: Router, replica_id: str):
    return next(one for one in router.snapshot().replicas if one.replica_id == replica_id)


def test_nobody_is_routed_to_before_registration():
    assert route(make_router(), range(8)) is None


def test_a_burst_does_not_herd_because_choices_are_booked():
    router = make_router(shares=False)
    register(router, "a", "1")
    register(router, "b", "1")
    picks = [route(router, range(i * 100, i * 100 + 80)).replica_id for i in range(6)]
    assert picks.count("a") == picks.count("b") == 3


def known(router: Router, holder: str, tokens: range) -> int:
    return router._knowledge.index.match(keys_of(*tokens)).get(holder, 0)


def test_what_an_engine_tells_of_itself_is_believed():
    router = make_router(shares=False)
    register(router, "a", "1")
    log, chain = ChangeLog("device", "1"), keys_of(*range(16))
    log.change(chain, [])
    told = log.since(None)
    assert router.learn("a", told)
    settle(router)
    assert known(router, "a", range(16)) == 4
    log.change([], chain[2:])
    assert router.learn("a", log.since(router.cursors(["a"])["a"]["device"]))
    settle(router)
    assert known(router, "a", range(16)) == 2
    log.clear()
    log.change(chain[:1], [])
    assert router.learn("a", log.since(told.end))
    settle(router)
    assert known(router, "a", range(16)) == replica(router, "a").known_blocks == 1


def test_a_lost_message_is_noticed_and_repaired_by_a_snapshot():
    router = make_router(shares=False)
    register(router, "a", "1")
    log, chain = ChangeLog("device", "1"), keys_of(*range(16))
    router.learn("a", log.since(None))
    log.change(chain, [])
    lost = log.since(router.cursors(["a"])["a"]["device"])
    log.change([], chain[3:])
    assert not router.learn("a", log.since(lost.end))
    assert router.cursors(["a"]) == {"a": {}}
    assert router.snapshot().num_gaps == 1
    assert router.learn("a", log.since(None))
    settle(router)
    assert known(router, "a", range(16)) == 3
    assert router.snapshot().num_snapshots == 2


def test_what_another_process_told_is_late():
    router = make_router(shares=False)
    register(router, "a", "2")
    log = ChangeLog("device", "1")
    log.change(keys_of(*range(16)), [])
    assert not router.learn("a", log.since(None))
    router.mark_dead("a", "2")
    assert not router.learn("a", log.since(None))
    assert known(router, "a", range(16)) == 0


def test_what_a_replica_told_before_it_was_known_is_asked_for_again():
    router = make_router(shares=False)
    device, host = ChangeLog("device", "1"), ChangeLog("host", "1")
    for log in (device, host):
        log.change(keys_of(*range(16)), [])
    assert not router.learn("a", device.since(None))
    router.learn("a", host.since(None))
    register(router, "a", "1")
    assert router.cursors(["a"]) == {"a": {}}
    for log in (device, host):
        assert router.learn("a", log.since(None))
    settle(router)
    assert [known(router, one, range(16)) for one in ("a", host_of("a"))] == [4, 4]


def test_a_machines_memory_counts_for_its_replicas_and_goes_with_it():
    router = make_router(shares=True)
    for name, machine in (("a", "m1"), ("b", "m1"), ("c", "m2")):
        register(router, name, "1", machine)
    host, shared = ChangeLog("host", "owner"), ChangeLog("shared", "owner")
    host.change(keys_of(*range(80)), [])
    shared.change(keys_of(*range(40)), [])
    for log in (host, shared):
        assert router.learn("m1", log.since(None))
    settle(router)
    picks = [route(router, range(88)) for _ in range(2)]
    assert {one.replica_id for one in picks} == {"a", "b"}
    assert picks[0].known_tokens == 80
    assert route(router, range(88), avoid=("a", "b")).shared_tokens == 40
    router.mark_dead("a", "1")
    assert known(router, "arena of m1", range(80)) == 20, "it outlives its replicas"
    router.forget_machine("m1")
    assert known(router, "arena of m1", range(80)) == 0
    assert route(router, range(88), avoid=("b", "c")) is None


def test_news_come_in_parts_so_that_no_decision_waits_for_all_of_them():
    router = make_router(shares=False)
    register(router, "a")
    log = ChangeLog("device", "1")
    log.change(range(10_000), [])
    router.learn("a", log.since(None))
    assert not router.work_off()
    assert 0 < replica(router, "a").known_blocks < 10_000
    settle(router)
    assert replica(router, "a").known_blocks == 10_000


def test_with_coarse_routing_blocks_only_these_are_known():
    router = make_router(shares=False, routing_block_tokens=16)
    register(router, "a")
    log, tokens = ChangeLog("device", "1"), range(70)
    router.learn("a", log.since(None))
    first = route(router, tokens)
    assert route(router, tokens).known_tokens == 64
    log.change(keys_of(*tokens), [])  # every block, and the router knows which ones it needs
    router.learn("a", log.since(router.cursors(["a"])["a"]["device"]))
    settle(router)
    assert replica(router, "a").known_blocks == 4
    assert first.work_tokens == 70


def test_an_index_that_is_wrong_too_often_is_not_used_until_it_is_right_again():
    clock = Clock()
    router = make_router(shares=False, clock=clock)
    register(router, "a")
    for _ in range(12):
        served(router, range(80), own=0)
    settle(router)
    assert replica(router, "a").accuracy.is_load_only
    assert route(router, range(80)).work_tokens == 80
    for _ in range(12):
        served(router, range(80), own=76)
    settle(router)
    accuracy = replica(router, "a").accuracy
    assert not accuracy.is_load_only
    assert accuracy.num_demotions == 1
    assert route(router, range(80)).work_tokens < 80


def test_a_device_that_keeps_no_blocks_is_never_believed_to_have_any():
    router = make_router(shares=False, reuses=False)
    register(router, "a")
    served(router, range(80))
    assert route(router, range(80)).known_tokens == 0


def test_a_request_that_failed_before_its_first_token_has_left_nothing():
    router = make_router(shares=False)
    register(router, "a")
    failed = route(router, range(80))
    finished(router, failed.request_id)
    assert route(router, range(80)).known_tokens == 0


def test_a_batch_is_taken_in_order_and_tells_who_is_up_when_that_is_news():
    router = make_router(shares=False)
    register(router, "a", "1")
    register(router, "b", "1")
    reply = router.serve(Batch())
    assert sorted(reply.replicas) == [("a", "1"), ("b", "1")]
    requests = tuple(RouteRequest(900 + n, 8) for n in range(2))
    again = router.serve(Batch((Lost("a", "1"),), requests, reply.version))
    assert [one.replica_id for one in again.routes] == ["b", "b"]
    assert [one.request_id for one in again.routes] == [900, 901]
    assert again.replicas == (("b", "1"),)
    assert router.serve(Batch((), (), again.version)).replicas is None


def test_what_ran_while_the_router_was_away_is_load_again():
    router = make_router(shares=False)
    register(router, "a", "1")
    register(router, "b", "1")
    streams = (Running(1, "a", "1", 80, False), Running(2, "a", "1", 80, True))
    late = (Running(3, "a", "0", 80, True), Running(4, "gone", "1", 80, True))
    router.serve(Batch((*streams, *late)))
    assert replica(router, "a").num_outstanding == 2
    assert route(router, range(8)).replica_id == "b"
    assert finished(router, 1)
    assert finished(router, 2)
    assert not finished(router, 3)
    assert replica(router, "a").num_outstanding == 0


def test_a_booked_prefix_counts_as_cached_before_it_is_computed():
    router = make_router(shares=False)
    register(router, "a", "1")
    register(router, "b", "1")
    first = route(router, range(80))
    first_token(router, first.request_id, receipt(80))
    again = route(router, range(88))
    assert (again.replica_id, again.known_tokens, again.work_tokens) == (first.replica_id, 80, 8)


def test_what_one_replica_computed_is_a_fetch_for_the_others():
    router = make_router(shares=True)
    register(router, "a", "1")
    first = route(router, range(80))
    router.mark_dead("a", "1")
    register(router, "b", "1")
    assert route(router, range(80)).work_tokens == 80, "nothing was saved: no first token"
    second = route(router, range(100, 180))
    first_token(router, second.request_id, receipt(80))
    router.mark_dead("b", "1")
    register(router, "c", "1")
    third = route(router, range(100, 180))
    assert (third.known_tokens, third.shared_tokens, third.work_tokens) == (0, 80, 1)
    assert not finished(router, first.request_id)


def test_generated_blocks_are_known_when_the_request_has_ended():
    router = make_router(shares=False)
    register(router, "a", "1")
    first = route(router, range(8))
    first_token(router, first.request_id, receipt(8))
    finished(router, first.request_id, keys_of(*range(16))[2:])
    assert route(router, range(20)).known_tokens == 16


def test_a_restarted_replica_is_another_one():
    router = make_router()
    assert register(router, "a", "1")
    assert not register(router, "a", "1")
    first = route(router, range(80))
    assert register(router, "a", "2")
    assert not router.mark_dead("a", "1"), "a late report about the old process"
    assert not first_token(router, first.request_id, receipt(80))
    second = route(router, range(80))
    assert (second.boot_id, second.known_tokens) == ("2", 0)


def test_a_dead_replica_is_not_routed_to_until_it_registers_again():
    router = make_router()
    register(router, "a", "1")
    route(router, range(8))
    assert router.mark_dead("a", "1")
    assert route(router, range(8)) is None
    assert replica(router, "a").num_outstanding == 0
    assert register(router, "a", "1"), "a false alarm ends with the next sign of life"
    assert route(router, range(8)).replica_id == "a"
    router.unregister("a")
    router.unregister("a")
    assert router.snapshot().replicas == ()


def test_reservations_that_nobody_reports_on_expire():
    clock = Clock()
    router = make_router(clock=clock)
    register(router, "a", "1")
    kept, lost = route(router, range(80)), route(router, range(100, 150))
    clock.now_s = 9
    first_token(router, kept.request_id, receipt(80))
    clock.now_s = 11
    snapshot = router.snapshot()
    assert (snapshot.num_expired, snapshot.num_reservations) == (1, 1)
    assert (replica(router, "a").pending_tokens, replica(router, "a").num_outstanding) == (0, 1)
    assert not finished(router, lost.request_id)


def test_a_long_stream_stays_load_until_its_own_longer_limit():
    clock = Clock()
    router = make_router(clock=clock)
    register(router, "a", "1")
    stream = route(router, range(80))
    first_token(router, stream.request_id, receipt(80))
    clock.now_s = 95
    late = route(router, range(100, 180))
    assert replica(router, "a").num_outstanding == 2
    clock.now_s = 101
    assert replica(router, "a").num_outstanding == 1, "its caller died long ago"
    assert not finished(router, stream.request_id)
    assert finished(router, late.request_id)


def served(router: Router, tokens: range, own: int = 0, shared: int = 0):
    """A request that found so many tokens in the replica and in the shared tier, and ended."""
    done = route(router, tokens)
    computed = len(tokens) - own - shared
    first_token(router, done.request_id, Receipt(len(tokens), own, 0, shared, computed))
    finished(router, done.request_id)
    return done


def test_a_true_prediction_leaves_the_knowledge_alone():
    router = make_router(shares=True)
    register(router, "a", "1")
    served(router, range(80))
    served(router, range(40), own=40)
    again = route(router, range(80))
    assert (again.known_tokens, again.shared_tokens) == (80, 80)


def test_blocks_that_came_from_the_shared_tier_count_against_the_replica_not_that_tier():
    router = make_router(shares=True)
    register(router, "a", "1")
    served(router, range(80))
    served(router, range(40), own=8, shared=32)
    assert route(router, range(80)).shared_tokens == 80
    assert replica(router, "a").accuracy.missing > 0


def test_a_shared_tier_that_lacks_blocks_is_believed_again_after_the_next_report():
    router = make_router(shares=True)
    register(router, "a", "1")
    served(router, range(80))
    router.mark_dead("a", "1")
    register(router, "b", "1")
    assert served(router, range(60), shared=20).shared_tokens == 60
    assert route(router, range(60)).shared_tokens == 20
    served(router, range(60), own=60)
    assert route(router, range(60)).shared_tokens == 60


def test_snapshot_tells_how_good_predictions_were():
    router = make_router()
    register(router, "a", "1")
    for _ in range(2):
        done = route(router, range(80))
        first_token(router, done.request_id, receipt(80, 40))
        finished(router, done.request_id)
    snapshot = router.snapshot()
    assert (snapshot.predicted_cached_tokens, snapshot.actual_cached_tokens) == (80, 80)
    assert replica(router, "a").num_routed == 2


class RouterBooks(RuleBasedStateMachine):
    """Random events against a model that keeps the simplest possible books."""

    reservations = Bundle("reservations")
    replica_ids = st.sampled_from(["a", "b", "c"])
    boots = st.sampled_from(["1", "2"])

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.router = make_router(clock=self.clock, policy="random")
        self.alive: dict[str, str] = {}
        self.booked: dict[int, list] = {}  # id -> [replica, work, expiry]

    def drop(self, replica_id: str) -> None:
        self.booked = {k: v for k, v in self.booked.items() if v[0] != replica_id}

    def expire(self) -> None:
        self.booked = {k: v for k, v in self.booked.items() if v[2] > self.clock.now_s}

    @rule(replica_id=replica_ids, boot=boots)
    def register(self, replica_id, boot):
        is_news = self.alive.get(replica_id) != boot
        assert register(self.router, replica_id, boot) == is_news
        if is_news:
            self.drop(replica_id)
        self.alive[replica_id] = boot

    @rule(replica_id=replica_ids, boot=boots)
    def mark_dead(self, replica_id, boot):
        is_news = self.alive.get(replica_id) == boot
        assert self.router.mark_dead(replica_id, boot) == is_news
        if is_news:
            self.drop(replica_id)
            del self.alive[replica_id]

    @rule(replica_id=replica_ids)
    def unregister(self, replica_id):
        self.router.unregister(replica_id)
        self.drop(replica_id)
        self.alive.pop(replica_id, None)

    @rule(target=reservations, start=st.integers(0, 3), length=st.integers(1, 30))
    def route(self, start, length):
        self.expire()
        chosen = route(self.router, range(start, start + length))
        if not self.alive:
            assert chosen is None
            return -1
        assert self.alive[chosen.replica_id] == chosen.boot_id
        assert 1 <= chosen.work_tokens <= length
        expiry_s = self.clock.now_s + 10
        self.booked[chosen.request_id] = [chosen.replica_id, chosen.work_tokens, expiry_s]
        return chosen.request_id

    @rule(reservation=reservations)
    def first_token(self, reservation):
        was_booked = reservation in self.booked
        assert first_token(self.router, reservation, receipt(30)) == was_booked
        if was_booked:
            self.booked[reservation][1:] = [0, self.clock.now_s + 100]

    @rule(reservation=reservations)
    def finished(self, reservation):
        was_booked = self.booked.pop(reservation, None) is not None
        assert finished(self.router, reservation, keys_of(*range(8))) == was_booked

    @rule(seconds=st.floats(0, 6) | st.floats(50, 60))
    def time_passes(self, seconds):
        self.clock.now_s += seconds
        self.router.snapshot()
        self.expire()

    @invariant()
    def books_balance(self):
        snapshot = self.router.snapshot()
        assert snapshot.num_reservations == len(self.booked)
        for one in snapshot.replicas:
            mine = [booking for booking in self.booked.values() if booking[0] == one.replica_id]
            assert one.pending_tokens == sum(work for _, work, _ in mine) >= 0
            assert one.num_outstanding == len(mine)
            assert one.alive == (one.replica_id in self.alive)


RouterBooks.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestRouterBooks = RouterBooks.TestCase
