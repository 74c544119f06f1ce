"""Several ranks in lock-step: a prefix counts only as far as every rank's shard of it is here.

Each rank's KV has bytes of its own, so that a shard of another rank is a wrong byte too. Everything
that upstream broadcasts is pickled on its way.
"""

import random
from dataclasses import replace

import pytest

from shared_cache.stores.store import MemoryBlockStore
from tests.trtllm_runtime.replica import STAGED_HERE, Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import ALL_LOOPS, SIZE, Rules, loop_name
from tests.trtllm_runtime.site import Mood, Site

IN_ALL_LOOPS = pytest.mark.parametrize("rules", ALL_LOOPS, ids=map(loop_name, ALL_LOOPS))
PROMPT = tuple(range(9 * SIZE + 3))


def run_cold(replica: Replica, request: Request) -> Request:
    replica.executor.blocks.evict_all()
    replica.run(request)
    replica.settle()
    return request


def finish(*replicas: Replica) -> None:
    for replica in replicas:
        replica.check_quiet()
        replica.site.check()
        replica.close()


@IN_ALL_LOOPS
@pytest.mark.parametrize("tp_size", [2, 4])
def test_every_rank_loads_its_own_shard(rules: Rules, tp_size: int) -> None:
    site = Site(tp_size)
    rules = replace(rules, enable_chunked_prefill=True, max_num_tokens=24)
    first, second = Replica(site, Setup(rules)), Replica(site, Setup(rules))
    answer = run_cold(first, Request(1, PROMPT, 9))
    first.check_quiet()
    again = run_cold(second, Request(1, PROMPT, 9))
    assert again.num_promised_tokens == 9 * SIZE
    assert again.generated == answer.generated
    assert len({len(medium._blocks) for medium in site.media}) == 1
    finish(first, second)


@pytest.mark.parametrize("staged", [False, True], ids=["in-match", "staged-ahead"])
@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize("num_kept", [0, 4])
def test_a_shard_that_one_rank_lacks_ends_the_prefix(
    num_kept: int, lacking: int, staged: bool
) -> None:
    site = Site(tp_size=2)
    first = Replica(site)
    run_cold(first, Request(1, PROMPT, 1))
    finish(first)
    medium = site.media[lacking]
    kept = site.hashes_of(Request(1, PROMPT))[:num_kept]
    medium._blocks = {name: medium._blocks[name] for name in kept}
    second = Replica(site, Setup(match=STAGED_HERE) if staged else None)
    request = Request(1, PROMPT, 1)
    (second.submit_staged if staged else second.submit)(request)
    second.run()
    assert request.num_promised_tokens == num_kept * SIZE
    finish(second)


def test_a_store_that_fails_one_rank_fails_all() -> None:
    site = Site(tp_size=2)
    first = Replica(site)
    run_cold(first, Request(1, PROMPT, 1))
    finish(first)
    good, site.media[1] = site.media[1], MemoryBlockStore(site.namespaces[1])
    second = Replica(site)
    assert run_cold(second, Request(1, PROMPT, 2)).num_promised_tokens == 0
    assert run_cold(second, Request(2, PROMPT, 2)).num_promised_tokens == 9 * SIZE  # from memory
    finish(second)
    assert set(site.media[1]._blocks) >= set(good._blocks)


@IN_ALL_LOOPS
def test_a_rank_whose_memory_is_smaller(rules: Rules) -> None:
    """Its saves are dropped and its shards evicted; the other rank has all of them."""
    site = Site(tp_size=2)
    replica = Replica(site, Setup(rules, num_slots=32))
    held = replica.caches[1].host.reserve(28)
    for number in range(6):
        run_cold(replica, Request(number, (*PROMPT[: 4 * SIZE], *[number] * SIZE, 1), 3))
    site.weather.change(Mood.FAILS)
    request = run_cold(replica, Request(9, (*PROMPT[: 4 * SIZE], *[2] * SIZE, 1), 3))
    assert request.num_promised_tokens <= 4 * SIZE
    replica.caches[1].host.cancel(held)
    site.weather.change(Mood.FINE)
    finish(replica)


@pytest.mark.parametrize("tp_size", [1, 2, 8])
@pytest.mark.parametrize("is_scattered", [False, True], ids=["in-order", "scattered"])
def test_metadata_of_a_very_long_prompt_stays_small(tp_size: int, is_scattered: bool) -> None:
    """As many blocks as a prompt of 128k tokens has, 32 to a block."""
    num_blocks = 4096
    site = Site(tp_size)
    rules = Rules(num_blocks=num_blocks + 64, max_num_tokens=SIZE * num_blocks + 64)
    replica = Replica(site, Setup(rules, num_slots=num_blocks + 512))
    if is_scattered:
        scatter(replica)
    prompt = tuple(range(SIZE * num_blocks))
    run_cold(replica, Request(1, prompt, 8))
    request = run_cold(replica, Request(2, prompt, 8))
    assert request.num_promised_tokens == SIZE * (num_blocks - 1)
    assert replica.executor.manager.max_metadata_bytes < 64 * 1024
    replica.close()


def scatter(replica: Replica) -> None:
    """Blocks and slots come in no order, as on a machine that has run for weeks."""
    draw = random.Random(7)
    free = list(replica.executor.blocks._free)
    draw.shuffle(free)
    replica.executor.blocks._free = type(replica.executor.blocks._free).fromkeys(free)
    for cache in replica.caches:
        slots = list(cache.host.reserve(cache.host.num_slots))
        draw.shuffle(slots)
        for slot in slots:
            cache.host.cancel([slot])
