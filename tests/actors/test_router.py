"""The router's books: whatever happens in whatever order, they balance."""

import random

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from actors.engine import CacheChanges, Receipt
from actors.router import Router, RouterConfig
from shared_cache.hashing import block_hashes

BLOCK = 4
CACHE_BLOCKS = 1000


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_router(shares=True, clock=None, **settings) -> Router:
    config = RouterConfig(
        reservation_timeout_s=10, stream_timeout_s=100, outstanding_cost=0, **settings
    )
    return Router(config, BLOCK, shares, random.Random(0), clock or Clock())


def hashes_of(*tokens: int):
    return block_hashes(tokens, BLOCK)


def route(router: Router, tokens: range):
    return router.route(hashes_of(*tokens), len(tokens))


def receipt(prompt: int, cached: int = 0) -> Receipt:
    return Receipt(prompt, cached, 0, 0, prompt - cached)


def replica(router: Router, replica_id: str):
    return next(one for one in router.snapshot().replicas if one.replica_id == replica_id)


def test_nobody_is_routed_to_before_registration():
    assert route(make_router(), range(8)) is None


def test_a_burst_does_not_herd_because_choices_are_booked():
    router = make_router(shares=False)
    router.register("a", "1", CACHE_BLOCKS)
    router.register("b", "1", CACHE_BLOCKS)
    picks = [route(router, range(i * 100, i * 100 + 80)).replica_id for i in range(6)]
    assert picks.count("a") == picks.count("b") == 3


def known(router: Router, replica_id: str, tokens: range) -> int:
    return router._index.depth(replica_id, hashes_of(*tokens))


def test_what_an_engine_tells_of_itself_is_believed():
    router = make_router(shares=False)
    router.register("a", "1", CACHE_BLOCKS)
    chain = tuple(hashes_of(*range(16)))
    assert router.cache_changed("a", "1", CacheChanges(stored=(chain,)))
    assert known(router, "a", range(16)) == 4
    assert router.cache_changed("a", "1", CacheChanges(removed=(chain[2],)))
    assert known(router, "a", range(16)) == 2
    assert router.cache_changed("a", "1", CacheChanges(stored=(chain[:1],), is_cleared=True))
    assert known(router, "a", range(16)) == 1
    assert replica(router, "a").known_blocks == 1


def test_what_another_process_told_is_late():
    router = make_router(shares=False)
    router.register("a", "2", CACHE_BLOCKS)
    told = CacheChanges(stored=(tuple(hashes_of(*range(16))),))
    assert not router.cache_changed("a", "1", told)
    assert not router.cache_changed("b", "2", told)
    router.mark_dead("a", "2")
    assert not router.cache_changed("a", "2", told)
    assert known(router, "a", range(16)) == 0


def test_a_booked_prefix_counts_as_cached_before_it_is_computed():
    router = make_router(shares=False)
    router.register("a", "1", CACHE_BLOCKS)
    router.register("b", "1", CACHE_BLOCKS)
    first = route(router, range(80))
    router.first_token(first.reservation_id, receipt(80))
    again = route(router, range(88))
    assert (again.replica_id, again.known_tokens, again.work_tokens) == (first.replica_id, 80, 8)


def test_what_one_replica_computed_is_a_fetch_for_the_others():
    router = make_router(shares=True, fetch_cost=0.1)
    router.register("a", "1", CACHE_BLOCKS)
    first = route(router, range(80))
    router.mark_dead("a", "1")
    router.register("b", "1", CACHE_BLOCKS)
    assert route(router, range(80)).work_tokens == 80, "nothing was saved: no first token"
    second = route(router, range(100, 180))
    router.first_token(second.reservation_id, receipt(80))
    router.mark_dead("b", "1")
    router.register("c", "1", CACHE_BLOCKS)
    third = route(router, range(100, 180))
    assert (third.known_tokens, third.shared_tokens, third.work_tokens) == (0, 80, 8)
    assert not router.finished(first.reservation_id)


def test_generated_blocks_are_known_when_the_request_has_ended():
    router = make_router(shares=False)
    router.register("a", "1", CACHE_BLOCKS)
    first = route(router, range(8))
    router.finished(first.reservation_id, hashes_of(*range(16)))
    assert route(router, range(20)).known_tokens == 16


def test_a_restarted_replica_is_another_one():
    router = make_router()
    assert router.register("a", "1", CACHE_BLOCKS)
    assert not router.register("a", "1", CACHE_BLOCKS)
    first = route(router, range(80))
    assert router.register("a", "2", CACHE_BLOCKS)
    assert not router.mark_dead("a", "1"), "a late report about the old process"
    assert not router.first_token(first.reservation_id, receipt(80))
    second = route(router, range(80))
    assert (second.boot_id, second.known_tokens) == ("2", 0)


def test_a_dead_replica_is_not_routed_to_until_it_registers_again():
    router = make_router()
    router.register("a", "1", CACHE_BLOCKS)
    route(router, range(8))
    assert router.mark_dead("a", "1")
    assert route(router, range(8)) is None
    assert replica(router, "a").num_outstanding == 0
    assert router.register("a", "1", CACHE_BLOCKS), "a false alarm ends with the next sign of life"
    assert route(router, range(8)).replica_id == "a"
    router.unregister("a")
    router.unregister("a")
    assert router.snapshot().replicas == ()


def test_reservations_that_nobody_reports_on_expire():
    clock = Clock()
    router = make_router(clock=clock)
    router.register("a", "1", CACHE_BLOCKS)
    kept, lost = route(router, range(80)), route(router, range(100, 150))
    clock.now_s = 9
    router.first_token(kept.reservation_id, receipt(80))
    clock.now_s = 11
    snapshot = router.snapshot()
    assert (snapshot.num_expired, snapshot.num_reservations) == (1, 1)
    assert (replica(router, "a").pending_tokens, replica(router, "a").num_outstanding) == (0, 1)
    assert not router.finished(lost.reservation_id)


def test_a_long_stream_stays_load_until_its_own_longer_limit():
    clock = Clock()
    router = make_router(clock=clock)
    router.register("a", "1", CACHE_BLOCKS)
    stream = route(router, range(80))
    router.first_token(stream.reservation_id, receipt(80))
    clock.now_s = 95
    late = route(router, range(100, 180))
    assert replica(router, "a").num_outstanding == 2
    clock.now_s = 101
    assert replica(router, "a").num_outstanding == 1, "its caller died long ago"
    assert not router.finished(stream.reservation_id)
    assert router.finished(late.reservation_id)


def served(router: Router, tokens: range, own: int = 0, shared: int = 0):
    """A request that found so many tokens in the replica and in the shared tier, and ended."""
    done = route(router, tokens)
    computed = len(tokens) - own - shared
    router.first_token(done.reservation_id, Receipt(len(tokens), own, 0, shared, computed))
    router.finished(done.reservation_id, hashes_of(*tokens))
    return done


def test_a_receipt_that_disproves_a_replicas_blocks_ends_the_belief_in_what_follows_them():
    router = make_router(shares=False)
    router.register("a", "1", CACHE_BLOCKS)
    served(router, range(80))
    assert served(router, range(40), own=16).known_tokens == 40, "it had lost the rest"
    assert route(router, range(80)).known_tokens == 40, "these were computed again, no more"


def test_a_true_prediction_leaves_the_knowledge_alone():
    router = make_router(shares=True)
    router.register("a", "1", CACHE_BLOCKS)
    served(router, range(80))
    served(router, range(40), own=40)
    again = route(router, range(80))
    assert (again.known_tokens, again.shared_tokens) == (80, 80)


def test_blocks_that_came_from_the_shared_tier_disprove_the_replica_not_that_tier():
    router = make_router(shares=True)
    router.register("a", "1", CACHE_BLOCKS)
    served(router, range(80))
    served(router, range(40), own=8, shared=32)
    again = route(router, range(80))
    assert (again.known_tokens, again.shared_tokens) == (40, 80)


def test_a_shared_tier_that_lacks_blocks_is_believed_again_after_the_next_report():
    router = make_router(shares=True)
    router.register("a", "1", CACHE_BLOCKS)
    served(router, range(80))
    router.mark_dead("a", "1")
    router.register("b", "1", CACHE_BLOCKS)
    assert served(router, range(60), shared=20).shared_tokens == 60
    assert route(router, range(80)).shared_tokens == 20
    served(router, range(60), own=60)
    assert route(router, range(80)).shared_tokens == 60


def test_snapshot_tells_how_good_predictions_were():
    router = make_router()
    router.register("a", "1", CACHE_BLOCKS)
    for _ in range(2):
        done = route(router, range(80))
        router.first_token(done.reservation_id, receipt(80, 40))
        router.finished(done.reservation_id)
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
        assert self.router.register(replica_id, boot, 3) == is_news
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
        self.booked[chosen.reservation_id] = [chosen.replica_id, chosen.work_tokens, expiry_s]
        return chosen.reservation_id

    @rule(reservation=reservations)
    def first_token(self, reservation):
        was_booked = reservation in self.booked
        assert self.router.first_token(reservation, receipt(30)) == was_booked
        if was_booked:
            self.booked[reservation][1:] = [0, self.clock.now_s + 100]

    @rule(reservation=reservations)
    def finished(self, reservation):
        was_booked = self.booked.pop(reservation, None) is not None
        assert self.router.finished(reservation, hashes_of(*range(8))) == was_booked

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
            assert one.known_blocks <= 3


TestRouterBooks = RouterBooks.TestCase
