"""What clean-up deletes: never what a kept run needs, and always enough."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, BlockHashChain, ReuseScope
from shared_cache.stores.store import StoredRun
from shared_cache.upkeep.collecting import (
    CLOCK_SKEW_S,
    LOW_WATER,
    CollectionRules,
    Victim,
    choose_victims,
)
from shared_cache.upkeep.inventory import take_inventory

NOW_S = 1_000_000.0
DAY_S = 86400.0


PAYERS = [ReuseScope(salt) for salt in (None, "red", "blue")]


def make_run(
    chain: BlockHashChain,
    first: int,
    end: int,
    used_s: float = NOW_S,
    num_bytes: int = 100,
    tenant: bytes = b"",
) -> StoredRun:
    hashes = tuple(chain.hashes[first:end])
    name = f"{hashes[0].hex()}.arrow"
    return StoredRun(name, chain.parent_of(first), hashes, num_bytes, used_s, tenant)


def chain(seed: int = 0, num_blocks: int = 8) -> BlockHashChain:
    return BlockHashChain(1, tokens=range(seed * 1000, seed * 1000 + num_blocks))


def names(victims: Sequence[Victim]) -> list[str]:
    return [victim.run.name for victim in victims]


@st.composite
def stores(draw: st.DrawFn) -> dict[str, list[StoredRun]]:
    """Prompts that share beginnings, cut anywhere, overlapping, in parts, used in any order."""
    found: dict[str, list[StoredRun]] = {}
    for namespace in draw(st.sampled_from([("a",), ("a", "b")])):
        by_name: dict[str, StoredRun] = {}
        for _ in range(draw(st.integers(0, 8))):
            shared, own = draw(st.integers(0, 5)), draw(st.integers(1, 5))
            salt = draw(st.integers(0, 2))
            tokens = [1] * shared + [100 + salt] * own
            scope = draw(st.sampled_from(PAYERS))
            one = BlockHashChain(1, scope, tokens)
            first = draw(st.integers(0, len(tokens) - 1))
            end = draw(st.integers(first + 1, len(tokens)))
            used_s = draw(
                st.sampled_from([0.0, NOW_S - 9 * DAY_S, NOW_S - DAY_S, NOW_S, NOW_S + 99 * DAY_S])
            )
            run = make_run(one, first, end, used_s, draw(st.integers(1, 500)), scope.tenant)
            by_name[run.name] = run
        found[namespace] = list(by_name.values())
    return found


rules = st.builds(
    CollectionRules,
    max_bytes=st.none() | st.integers(1, 3000),
    max_age_s=st.none() | st.sampled_from([DAY_S / 2, 5 * DAY_S]),
    quotas=st.dictionaries(
        st.sampled_from([one.tenant for one in PAYERS[1:]]), st.integers(1, 1500)
    ),
)


def left_of(
    store: Mapping[str, Sequence[StoredRun]], victims: Sequence[Victim]
) -> dict[str, list[StoredRun]]:
    gone = {(victim.namespace, victim.run.name) for victim in victims}
    return {
        namespace: [run for run in runs if (namespace, run.name) not in gone]
        for namespace, runs in store.items()
    }


def bytes_of(store: Mapping[str, Sequence[StoredRun]]) -> int:
    return sum(run.num_bytes for runs in store.values() for run in runs)


def needs(run: StoredRun, other: StoredRun) -> bool:
    return run is not other and run.parent in other.hashes


@given(store=stores(), rules=rules)
def test_at_every_moment_no_run_is_left_without_one_that_it_needs(
    store: dict[str, list[StoredRun]], rules: CollectionRules
) -> None:
    """Whoever is killed half-way through the list leaves no run that cannot be found."""
    left = {namespace: list(runs) for namespace, runs in store.items()}
    for victim in choose_victims(store, rules, NOW_S):
        runs = left[victim.namespace]
        runs.remove(victim.run)
        assert not any(needs(run, victim.run) for run in runs)


@given(store=stores(), rules=rules)
def test_the_budget_is_kept_and_no_more_is_deleted_than_that_takes(
    store: dict[str, list[StoredRun]], rules: CollectionRules
) -> None:
    victims = choose_victims(store, rules, NOW_S)
    left_bytes = bytes_of(left_of(store, victims))
    surplus = [victim for victim in victims if victim.reason == "budget"]
    if rules.max_bytes is None:
        assert not surplus
        return
    assert left_bytes <= rules.max_bytes
    if surplus:
        others = [victim for victim in victims if victim.reason != "budget"]
        assert bytes_of(left_of(store, others)) > rules.max_bytes
        goal_bytes = int(rules.max_bytes * LOW_WATER)
        assert left_bytes <= goal_bytes < left_bytes + surplus[-1].run.num_bytes


@given(store=stores(), rules=rules)
def test_quotas_are_kept_and_cost_only_those_who_have_more(
    store: dict[str, list[StoredRun]], rules: CollectionRules
) -> None:
    def bytes_by_tenant(victims: Sequence[Victim]) -> Counter[bytes]:
        counts: Counter[bytes] = Counter()
        for runs in left_of(store, victims).values():
            for run in runs:
                counts[run.tenant] += run.num_bytes
        return counts

    victims = choose_victims(store, rules, NOW_S)
    before = bytes_by_tenant([one for one in victims if one.reason == "age"])
    left = bytes_by_tenant([one for one in victims if one.reason != "budget"])
    beyond = [one for one in victims if one.reason == "quota"]
    for tenant in before.keys() | rules.quotas.keys():
        quota = rules.quotas.get(tenant)
        own = [one.run for one in beyond if one.run.tenant == tenant]
        assert bool(own) == (quota is not None and before[tenant] > quota)
        if own:
            goal_bytes = int(quota * LOW_WATER)
            assert left[tenant] <= goal_bytes < left[tenant] + own[-1].num_bytes


@given(store=stores(), max_age_s=st.sampled_from([DAY_S / 2, 5 * DAY_S]))
def test_age_deletes_all_that_is_too_old_except_what_younger_runs_need(
    store: dict[str, list[StoredRun]], max_age_s: float
) -> None:
    victims = choose_victims(store, CollectionRules(max_age_s=max_age_s), NOW_S)
    every = [run for runs in store.values() for run in runs]
    is_ahead = [run.used_s > NOW_S + CLOCK_SKEW_S for run in every]
    if 2 * sum(is_ahead) > sum(run.used_s > 0 for run in every):
        assert not victims  # it is our clock that is wrong
        return

    def is_too_old(run: StoredRun) -> bool:
        is_believed = run.used_s <= NOW_S + CLOCK_SKEW_S
        return run.used_s > 0 and (run.used_s < NOW_S - max_age_s or not is_believed)

    assert all(is_too_old(victim.run) for victim in victims)
    for runs in left_of(store, victims).values():
        for run in runs:
            assert not is_too_old(run) or any(needs(other, run) for other in runs)


@given(store=stores(), rules=rules, seed=st.integers(0, 99))
def test_the_answer_does_not_depend_on_the_order_of_the_listing(
    store: dict[str, list[StoredRun]], rules: CollectionRules, seed: int
) -> None:
    shuffled = {n: random.Random(seed).sample(runs, len(runs)) for n, runs in store.items()}
    reordered = dict(reversed(shuffled.items()))
    assert choose_victims(store, rules, NOW_S) == choose_victims(reordered, rules, NOW_S)


@given(store=stores(), rules=rules, seed=st.integers(0, 99))
def test_what_is_referenced_stays_with_all_that_it_needs(
    store: dict[str, list[StoredRun]], rules: CollectionRules, seed: int
) -> None:
    every = sorted({h for runs in store.values() for run in runs for h in run.hashes})
    kept = set(random.Random(seed).sample(every, len(every) // 3))
    victims = choose_victims(store, rules, NOW_S, kept.__contains__)
    assert not any(kept.intersection(victim.run.hashes) for victim in victims)
    left = left_of(store, victims)
    for namespace, runs in left.items():
        deleted = [run for run in store[namespace] if run not in runs]
        assert not any(needs(run, other) for run in runs for other in deleted)
    if rules.max_bytes is not None and bytes_of(left) > rules.max_bytes:
        for runs in left.values():  # then nothing else could have gone
            for run in runs:
                assert kept.intersection(run.hashes) or any(needs(other, run) for other in runs)


def test_the_least_recently_used_leaf_goes_first() -> None:
    one, other = chain(1), chain(2)
    runs = [
        make_run(one, 0, 4, NOW_S - 400),
        make_run(one, 4, 8, NOW_S - 100),
        make_run(other, 0, 4, NOW_S - 300),
        make_run(other, 4, 8, NOW_S - 200),
    ]
    victims = choose_victims({"n": runs}, CollectionRules(max_bytes=1), NOW_S)
    assert names(victims) == [runs[i].name for i in (3, 2, 1, 0)]


def test_one_budget_holds_for_all_namespaces_and_equal_names_are_kept_apart() -> None:
    """Two models' blocks of the same prompt have the same hashes."""
    head, tail = make_run(chain(), 0, 4, NOW_S - 50), make_run(chain(), 4, 8, NOW_S - 40)
    old_model = [make_run(chain(), 0, 4, NOW_S - 90)]
    victims = choose_victims(
        {"new": [head, tail], "old": old_model}, CollectionRules(max_bytes=250), NOW_S
    )
    assert [(victim.namespace, victim.run) for victim in victims] == [("old", old_model[0])]


def test_a_run_below_its_budget_is_left_alone_and_above_it_is_cut_to_the_low_water_mark() -> None:
    runs = [make_run(chain(i), 0, 4, NOW_S - i) for i in range(1, 21)]
    assert not choose_victims({"n": runs}, CollectionRules(max_bytes=2000), NOW_S)
    victims = choose_victims({"n": runs}, CollectionRules(max_bytes=1999), NOW_S)
    assert names(victims) == [runs[i].name for i in (19, 18, 17)]


def test_no_limits_delete_nothing() -> None:
    runs = [make_run(chain(), 0, 4, used_s=1.0)]
    assert not choose_victims({"n": runs}, CollectionRules(), NOW_S)
    assert not choose_victims({}, CollectionRules(1, 1.0), NOW_S)


def test_a_run_without_its_beginning_ends_by_age() -> None:
    orphan = make_run(chain(), 4, 8, NOW_S - 2 * DAY_S)
    aged = CollectionRules(max_age_s=DAY_S)
    assert names(choose_victims({"n": [orphan]}, aged, NOW_S)) == [orphan.name]
    assert not choose_victims({"n": [orphan]}, aged, NOW_S - 1.5 * DAY_S)


@pytest.mark.parametrize("step_s", [-30 * DAY_S, -3600.0, 3600.0])
def test_a_clock_that_was_set_does_not_empty_the_store(step_s: float) -> None:
    runs = [make_run(chain(i), 0, 4, NOW_S - i * 60) for i in range(20)]
    aged = CollectionRules(max_age_s=2 * 3600.0)
    assert not choose_victims({"n": runs}, aged, NOW_S + step_s)


def test_a_clock_set_back_leaves_the_order_of_last_use_as_it_was() -> None:
    runs = [make_run(chain(i), 0, 4, NOW_S - i * 60) for i in range(10)]
    victims = choose_victims({"n": runs}, CollectionRules(max_bytes=999), NOW_S - 30 * DAY_S)
    assert names(victims) == [runs[9].name, runs[8].name]


def test_a_run_from_the_future_is_not_kept_for_ever() -> None:
    odd = make_run(chain(99), 0, 4, NOW_S + 1000 * DAY_S)
    runs = [make_run(chain(i), 0, 4, NOW_S - i) for i in range(3)]
    for limit in (CollectionRules(max_age_s=DAY_S), CollectionRules(max_bytes=399)):
        assert names(choose_victims({"n": [*runs, odd]}, limit, NOW_S)) == [odd.name]


def test_where_no_time_is_told_age_deletes_nothing_and_the_budget_still_holds() -> None:
    runs = [make_run(chain(i), 0, 4, used_s=0.0) for i in range(4)]
    assert not choose_victims({"n": runs}, CollectionRules(max_age_s=1.0), NOW_S)
    assert len(choose_victims({"n": runs}, CollectionRules(max_bytes=399), NOW_S)) == 1


def test_forged_runs_that_need_each_other_end_the_search_all_the_same() -> None:
    a, b = BlockHash(b"a" * 32), BlockHash(b"b" * 32)
    circle = [StoredRun("1", b, (a,), 10, 5.0), StoredRun("2", a, (b,), 10, 5.0)]
    itself = StoredRun("3", a, (a, b), 10, 5.0)
    assert not choose_victims({"n": circle}, CollectionRules(1, 1.0), NOW_S)
    assert names(choose_victims({"n": [itself]}, CollectionRules(1), NOW_S)) == ["3"]


def test_an_inventory_counts_what_is_there_twice_and_what_has_no_beginning() -> None:
    one = chain(1)
    runs = [
        make_run(one, 0, 4, used_s=20.0),
        make_run(one, 2, 5, used_s=30.0),
        make_run(chain(2), 1, 2, used_s=0.0),
    ]
    found = take_inventory(runs)
    assert one.parent_of(0) == DEFAULT_SCOPE.root_hash()
    assert (found.num_runs, found.num_blocks, found.num_bytes) == (3, 8, 300)
    assert (found.num_duplicates, found.num_unrooted) == (2, 1)
    assert (found.used_first_s, found.used_last_s) == (20.0, 30.0)
    assert found.run_lengths == {1: 1, 4: 2}
    empty = take_inventory([])
    assert (empty.num_runs, empty.used_last_s, empty.run_lengths) == (0, None, {})
