"""The simulator: sums that can be done by hand, and runs that repeat and rank rules sanely."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks.routing.autoscaler import Autoscale, Autoscaler
from benchmarks.routing.cells import Cell, arrivals_of, run_cell, scenario_of
from benchmarks.routing.hardware import TOKENS_PER_BLOCK, Hardware
from benchmarks.routing.knowledge import Beliefs, EventFaults
from benchmarks.routing.memory import DeviceMemory, LruTier
from benchmarks.routing.scenario import Outcome, Scenario
from benchmarks.routing.simulation import Simulation
from benchmarks.routing.workload import Arrival, Workload
from benchmarks.traces import GeneratedTraffic

ROOT = Path(__file__).resolve().parents[2]
SMALL = Cell("least_cost", "host", "small", num_replicas=4, rate=5.5, duration_s=120.0)


@cache
def workload() -> Workload:
    traffic = GeneratedTraffic(seed=5, num_sessions=300, hours=0.1)
    return Workload("small", traffic.requests())


@cache
def figures(policy: str, tiers: str = "host"):
    return run_cell(replace(SMALL, policy=policy, tiers=tiers), {"small": workload()})


def run(scenario: Scenario, *arrivals: Arrival) -> Outcome:
    return Simulation(scenario, arrivals).run()


def arrival(at_s: float, blocks: tuple[int, ...], rest: int = 100, output: int = 10) -> Arrival:
    return Arrival(at_s, len(blocks) * TOKENS_PER_BLOCK + rest, output, blocks, blocks[0])


BLOCKS = tuple(range(20))
ALONE = Scenario("round_robin", 1)


def test_a_lone_request_takes_its_prefill():
    outcome = run(ALONE, arrival(0.0, BLOCKS))
    assert outcome.served[0].ttft_s == pytest.approx(Hardware().prefill_s(10_340, 0))


def test_the_same_prompt_again_is_on_the_device():
    outcome = run(ALONE, arrival(0.0, BLOCKS), arrival(60.0, BLOCKS))
    again = outcome.served[1]
    assert (again.receipt.device, again.receipt.computed) == (10_240, 100)
    assert again.ttft_s == pytest.approx(Hardware().prefill_s(100, 10_240))


@pytest.mark.parametrize("tier", ["host", "store"])
def test_what_left_the_device_comes_back_over_its_link(tier):
    hardware = replace(Hardware(device_tokens=12_288), **{f"{tier}_tokens": 1_000_000})
    scenario = Scenario("round_robin", 1, hardware)
    others = arrival(60.0, tuple(range(100, 120)))
    outcome = run(scenario, arrival(0.0, BLOCKS), others, arrival(120.0, BLOCKS))
    last = outcome.served[2]
    loaded = last.receipt.host if tier == "host" else last.receipt.shared
    load_s = hardware.host_load_s(loaded) if tier == "host" else hardware.store_load_s(loaded)
    assert loaded + last.receipt.device == 10_240
    assert loaded > 8_000
    assert last.ttft_s == pytest.approx(load_s + hardware.prefill_s(100, 10_240))


def test_two_at_once_queue_and_decodes_slow_the_next_prefill_down():
    scenario = Scenario("round_robin", 1)
    two = run(scenario, arrival(0.0, BLOCKS), arrival(0.0, tuple(range(100, 120))))
    work_s = Hardware().prefill_s(10_340, 0)
    second_s = two.served[1].ttft_s - two.served[0].ttft_s
    assert work_s * 1.005 < second_s < work_s * 1.02


def test_a_request_waits_until_kv_memory_is_free():
    scenario = Scenario("round_robin", 1, Hardware(device_tokens=12_288))
    long = arrival(0.0, BLOCKS, output=200)
    outcome = run(scenario, long, arrival(0.0, tuple(range(100, 120))))
    first_s, second_s = (one.ttft_s for one in outcome.served)
    assert second_s > first_s + 199 * Hardware().step_s


def test_pinned_blocks_are_not_evicted_and_shared_ones_count_once():
    device = DeviceMemory(10)
    assert device.pin((1, 2, 3), 1) == []
    assert device.pin((1, 2, 4), 1) == []
    assert device.num_pinned == 4 + 2
    assert not device.can_pin((7, 8, 9, 10, 11), 0)
    device.unpin((1, 2, 3), 1)
    assert device.pin((7, 8, 9, 10), 0) == []
    assert device.pin((11, 12), 0) == [3]
    assert device.depth((1, 2, 3)) == 2


def test_a_tier_forgets_the_least_recently_used_tail():
    tier = LruTier(3)
    assert tier.use((1, 2, 3)) == ([3, 2, 1], [])
    assert tier.use((7,)) == ([7], [3])
    assert (tier.depth((1, 2, 3)), len(tier)) == (2, 3)


@pytest.mark.parametrize(("delay_s", "lost", "seen_s"), [(0, 0, 1.0), (5, 0, 6.1), (0, 1, None)])
def test_events_come_at_once_late_or_never(delay_s, lost, seen_s):
    beliefs = Beliefs("events", EventFaults(delay_s, lost), random.Random(0))
    beliefs.add_replica("a")
    beliefs.told(beliefs.device, "a", (1, 2), (), 1.0)
    depths = {at_s: beliefs.matches((1, 2, 3), at_s) for at_s in (1.0, 5.9, 6.1)}
    assert {at_s for at_s, found in depths.items() if found} == {
        at_s for at_s in depths if seen_s is not None and at_s >= seen_s
    }


def test_bookings_are_known_at_once_to_those_who_book():
    for knowledge, is_known in (("bookings", True), ("events", False), ("nothing", False)):
        beliefs = Beliefs(knowledge, EventFaults(delay_s=9), random.Random(0))
        beliefs.add_replica("a")
        beliefs.booked("a", (1, 2))
        assert bool(beliefs.matches((1, 2), 0.0)) == is_known


def test_rules_rank_sanely_on_generated_traffic():
    means = {
        name: figures(name).ttft_mean_s
        for name in ("least_cost", "llm_d", "least_outstanding", "random")
    }
    assert means["least_cost"] < 1.02 * means["llm_d"]
    assert means["llm_d"] < means["least_outstanding"] < means["random"]
    assert figures("least_cost").hit_rate > figures("least_outstanding").hit_rate


def test_a_store_gives_every_rule_the_same_hits():
    rates = [figures(name, "store").hit_rate for name in ("least_cost", "least_outstanding")]
    assert rates[0] == pytest.approx(rates[1], abs=0.03)


def test_the_router_knows_when_first_tokens_come():
    one = figures("least_cost")
    assert one.prediction_error_s < 0.3 * one.ttft_mean_s


@pytest.mark.parametrize("policy", ["least_cost", "round_robin"])
def test_a_dead_replica_is_not_chosen_after_its_first_failure(policy):
    cell = replace(SMALL, policy=policy, deaths=((60.0, "replica-0001"),))
    outcome = run(scenario_of(cell), *arrivals_of(cell, workload()))
    moved = [one for one in outcome.served if len(one.replica_ids) > 1]
    assert moved
    assert all(one.replica_ids[0] == "replica-0001" for one in moved)
    late = [one for one in outcome.served if one.arrival.at_s >= 60.0]
    assert all("replica-0001" not in one.replica_ids for one in late)
    assert all(one.ttft_s is not None for one in outcome.served)


def test_autoscaling_adds_replicas_that_take_requests():
    autoscale = Autoscale(2, 6, target_ongoing=4.0, start_s=5.0)
    cell = replace(SMALL, num_replicas=2, autoscale=autoscale)
    outcome = run(scenario_of(cell), *arrivals_of(cell, workload()))
    used = {name for one in outcome.served for name in one.replica_ids}
    assert 2 < len(used) <= 6
    assert outcome.served[-1].ttft_s < 20


def test_the_autoscaler_shrinks_slowly_and_one_by_one():
    scaler = Autoscaler(Autoscale(1, 9, target_ongoing=5, shrink_after_s=60))
    changes = [scaler.change(4, 5, at_s) for at_s in (0.0, 30.0, 60.0, 90.0, 120.0)]
    assert changes == [0, 0, -1, 0, -1]
    assert scaler.change(2, 99, 130.0) == 7


def test_two_routers_share_the_sessions_between_them():
    both = run_cell(replace(SMALL, num_shards=2), {"small": workload()})
    one = figures("least_cost")
    assert both.num_requests == one.num_requests
    assert both.shed_rate == 0.0
    assert both.hit_rate == pytest.approx(one.hit_rate, abs=0.1)


def test_refused_requests_are_counted_and_nobody_else_is_lost():
    one = run_cell(replace(SMALL, policy="random", max_pending=1), {"small": workload()})
    assert 0.0 < one.shed_rate < 0.7


def test_shifted_copies_keep_the_rate_and_the_pauses():
    arrivals = workload().arrivals(20.0, 100.0, seed=3)
    assert len(arrivals) == pytest.approx(2000, rel=0.25)
    assert arrivals == sorted(arrivals, key=lambda one: one.at_s)
    assert arrivals != workload().arrivals(20.0, 100.0, seed=4)
    assert all(one.num_tokens > len(one.blocks) * TOKENS_PER_BLOCK for one in arrivals)


def test_a_seed_repeats_to_the_byte_in_every_process():
    """Whatever the process's hashes of strings are."""
    script = (
        "from tests.benchmarks.test_routing_simulation import *\n"
        "cell = replace(SMALL, duration_s=60.0, lost_share=0.05, delay_s=1.0)\n"
        "for name in ('least_cost', 'sglang', 'session_hash'):\n"
        "    print(repr(run_cell(replace(cell, policy=name), {'small': workload()})))\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in (1, 2)
    ]
    assert printed[0] == printed[1]
    assert printed[0].count(b"Figures(") == 3
