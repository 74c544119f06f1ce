"""Ranks, engines and the arena's owner as processes of one machine; any of them may be killed."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared_cache.config import CacheConfig
from tests.shared_cache.arenas import (
    OwnerProcess,
    await_true,
    host_config,
    memory_folder,
    owner_process,
)
from tests.trtllm_runtime.processes import EngineProcess, RankProcess, open_caches
from tests.trtllm_runtime.replica import STAGED_HERE, STAGES_IN_MATCH, Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules
from tests.trtllm_runtime.site import Site

PROMPT = tuple(range(9 * SIZE + 3))


@pytest.fixture
def config(tmp_path: Path) -> Iterator[CacheConfig]:
    with memory_folder() as folder:
        host = host_config(folder).model_dump(mode="json", exclude_defaults=True)
        yield CacheConfig.model_validate(
            {"store": f"file://{tmp_path}", "host": host, "cost": {"gate": False}}
        )


@pytest.fixture
def owner(config: CacheConfig) -> Iterator[OwnerProcess]:
    with owner_process(config.host) as owner:
        yield owner


class Engine:
    """Rank 0 in this process, the others in theirs."""

    def __init__(self, config: CacheConfig, tp_size: int, setup: Setup) -> None:
        self.ranks = [RankProcess(config, rank, tp_size) for rank in range(1, tp_size)]
        caches = open_caches(config, tp_size)
        self.replica = Replica(Site(tp_size), setup, caches, self.ranks)

    def run(self, number: int, prompt: tuple[int, ...] = PROMPT, num_new: int = 3) -> Request:
        """A request on a device that has forgotten all; what it saved is in the arena then."""
        request = Request(number, prompt, num_new)
        self.replica.executor.blocks.evict_all()
        self.replica.run(request)
        self.replica.settle()
        for rank in self.ranks:
            rank.settle()
        self.replica.check_books()
        return request

    def close(self) -> None:
        self.replica.close()  # and its workers, wherever they are

    def kill(self) -> None:
        """Every process but this one is gone at once; here nothing is said goodbye to."""
        for rank in self.ranks:
            rank.kill()
        self.replica.executor.is_dead = True
        self.replica.cache.close()


def test_a_rank_copies_what_rank_0_leased_for_it(config: CacheConfig, owner: OwnerProcess) -> None:
    setup = Setup(Rules(overlap=True), STAGES_IN_MATCH)
    for engine_number in range(2):  # the second one loads what the first has left in the arena
        engine = Engine(config, 2, setup)
        first, again = engine.run(1), engine.run(2)
        assert first.num_promised_tokens == (9 * SIZE if engine_number else 0)
        assert again.num_promised_tokens == 9 * SIZE
        engine.close()


def test_a_prefix_comes_from_the_store_for_every_rank(
    config: CacheConfig, owner: OwnerProcess
) -> None:
    setup = Setup(match=STAGES_IN_MATCH)
    engine = Engine(config, 2, setup)
    engine.run(1)
    for cache in engine.replica.caches:
        assert cache.flush(20.0)
    engine.ranks[0].ask("settle")
    engine.close()
    owner.kill()
    owner.start()
    for cache in open_caches(config, 2):  # nothing that was in the arena is wanted here
        slots = cache.host.reserve(cache.host.num_slots)
        cache.host.cancel(slots)
        cache.close()
    engine = Engine(config, 2, setup)
    assert engine.run(2).num_promised_tokens == 9 * SIZE
    engine.close()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_owner_is_killed_between_promise_and_load(
    config: CacheConfig, owner: OwnerProcess, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is leased stays readable; the loop does not notice."""
    engine = Engine(config, tp_size, Setup(Rules(overlap=True), STAGES_IN_MATCH))
    engine.run(1)
    match = engine.replica.scheduler.get_num_new_matched_tokens

    def match_and_kill(*args: object) -> object:
        answer = match(*args)  # type: ignore[arg-type]
        owner.kill()
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(engine.replica.scheduler, "get_num_new_matched_tokens", match_and_kill)
        request = Request(2, PROMPT, 5)
        engine.replica.executor.blocks.evict_all()
        engine.replica.run(request)
    assert request.num_promised_tokens == 9 * SIZE
    request = Request(3, (*PROMPT, 5), 5)
    engine.replica.executor.blocks.evict_all()
    engine.replica.run(request)  # nobody keeps the books now
    owner.start()
    await_true(lambda: engine.run(next(numbers)).num_promised_tokens == 9 * SIZE)
    engine.close()


numbers = iter(range(1000, 1 << 30))


def test_an_engine_is_killed_in_the_middle_of_everything(
    config: CacheConfig, owner: OwnerProcess
) -> None:
    """Its leases and reservations end with it; the next one loads what it had saved."""
    prompts = [(*PROMPT[: cut * SIZE], 1000 + cut, 7) for cut in range(1, 9)]
    with ExitStack() as stack:
        for round_number in range(2):
            victim = EngineProcess(config, overlap=bool(round_number))
            stack.callback(victim.process.kill)
            victim.tell("churn", prompts)
            for _ in range(60):
                victim.answer()
            victim.kill()
        heir = EngineProcess(config)
        stack.callback(heir.process.kill)
        promised, _ = heir.run(prompts[-1], 3)
        assert promised == 8 * SIZE
        assert heir.run(PROMPT, 2)[0] >= 8 * SIZE
        heir.close()
        (cache,) = open_caches(config, 1)
        stack.callback(cache.close)
        await_true(lambda: cache.stats().host.leased_slots == 0)


def test_ranks_are_killed_with_their_engine(config: CacheConfig, owner: OwnerProcess) -> None:
    setup = Setup(Rules(overlap=True), STAGES_IN_MATCH)
    engine = Engine(config, 2, setup)
    engine.run(1)
    engine.replica.executor.blocks.evict_all()
    engine.replica.submit(Request(2, PROMPT, 9))
    engine.replica.step()
    engine.kill()
    engine = Engine(config, 2, setup)
    assert engine.run(3).num_promised_tokens == 9 * SIZE
    engine.close()


def test_staged_ahead_by_our_replica_in_rank_0s_process(
    config: CacheConfig, owner: OwnerProcess
) -> None:
    engine = Engine(config, 2, Setup(Rules(), STAGED_HERE))
    engine.run(1)
    engine.replica.executor.blocks.evict_all()
    request = engine.replica.submit_staged(Request(2, PROMPT, 3))
    engine.replica.run()
    assert request.num_promised_tokens == 9 * SIZE
    unstaged = engine.run(3, (*PROMPT[: 5 * SIZE], 1, 2))
    assert unstaged.num_promised_tokens == 0, "nobody leased it, and the match asks nobody"
    engine.close()
