"""Passes that run ahead of the host: same answers, same blocks, nothing waits that need not."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.engine import SamplingParams
from actors.engines.torch.forward import PlainForward
from actors.engines.torch.pool import allocate_pool
from actors.engines.torch.runner import LaunchedPass, Runner
from actors.engines.torch.scheduled import Turn
from shared_cache.errors import ModelError
from shared_cache.namespace import BlockLayout
from tests.engine.conftest import (
    BLOCK,
    Greedy,
    MakeEngine,
    chunks,
    request,
    some_prompt,
    tokens,
)
from tests.engine.test_connector_order import Pair

Steps = list[tuple[str, int]]


LOOPS = ("overlapped",)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """(launch or read, tokens of the pass), in the order in which the engine does it."""
    done: Steps = []
    launch, choices = Runner.launch, LaunchedPass.choices

    def noted_launch(runner: Runner, turn: Turn, samplers: Any) -> Any:
        done.append(("launch", sum(item.num_fed for item in turn.items)))
        return launch(runner, turn, samplers)

    def noted_choices(launched: LaunchedPass) -> Any:
        done.append(("read", sum(item.num_fed for item in launched.items)))
        return choices(launched)

    monkeypatch.setattr(Runner, "launch", noted_launch)
    monkeypatch.setattr(LaunchedPass, "choices", noted_choices)
    return done


async def test_a_pass_is_launched_before_the_one_before_it_is_read(
    make_engine: MakeEngine, plain_greedy: Greedy, steps: Steps
) -> None:
    found = await tokens(make_engine(), request(some_prompt(10), 4, ignore_eos=True))
    assert found == plain_greedy(some_prompt(10), 4)
    read, launch = ("read", 1), ("launch", 1)
    assert steps == [("launch", 10), launch, ("read", 10), launch, read, launch, read, read]


async def test_tokens_do_not_wait_for_a_launch_that_takes_long(
    make_engine: MakeEngine, steps: Steps
) -> None:
    engine = make_engine(max_num_tokens=64)
    first = asyncio.create_task(tokens(engine, request(some_prompt(9), 200, ignore_eos=True)))
    while len(steps) < 8:
        await asyncio.sleep(0)
    await tokens(engine, request(some_prompt(50, 1), 2))
    await first
    (long,) = [index for index, step in enumerate(steps) if step == ("launch", 51)]
    assert steps[long - 1] == ("read", 1)
    assert steps[long + 1 : long + 3] == [("launch", 2), ("read", 51)]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.8, "seed": 3}, {"logprobs": 2}],
    ids=["sampled", "logprobs"],
)
async def test_what_the_host_chooses_is_waited_for(
    settings: dict[str, Any], make_engine: MakeEngine, steps: Steps
) -> None:
    wanted = request(some_prompt(10), 4, ignore_eos=True, **settings)
    found = await chunks(make_engine(), wanted)
    assert steps == [("launch", 10), ("read", 10)] + [("launch", 1), ("read", 1)] * 3
    plain = await chunks(make_engine(disable_overlap_scheduler=True), wanted)
    assert [(c.token_ids, c.logprobs) for c in found] == [(c.token_ids, c.logprobs) for c in plain]


async def test_drafts_are_waited_for(
    make_engine: MakeEngine, plain_greedy: Greedy, steps: Steps
) -> None:
    drafts = {"decoding_type": "NGram", "max_draft_len": 6, "max_matching_ngram_size": 1}
    engine = make_engine(speculative_config=drafts)
    prompt = some_prompt(4) * 3
    assert await tokens(engine, request(prompt, 30)) == plain_greedy(prompt, 30)
    assert {before for (before, _) in steps[::2]} == {"launch"}


async def test_it_can_be_switched_off(make_engine: MakeEngine, steps: Steps) -> None:
    await tokens(make_engine(disable_overlap_scheduler=True), request(some_prompt(9), 5))
    assert [name for name, _ in steps] == ["launch", "read"] * (len(steps) // 2)


async def test_answers_of_many_requests_are_those_of_transformers(
    make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    """Some sample, some end early, several share a prefix, and there is room for few at a time."""
    engine = make_engine(pool_tokens=160, max_batch_size=3, max_num_tokens=16)
    plain = make_engine(disable_overlap_scheduler=True)
    shared = some_prompt(2 * BLOCK)
    wanted = [
        request(
            [*(shared if i % 3 else []), *some_prompt(3 + 2 * i, seed=i)],
            5 + 3 * i,
            f"r{i}",
            **({"temperature": 1.0, "seed": i} if i % 4 == 3 else {}),
        )
        for i in range(10)
    ]
    together = await asyncio.gather(*[tokens(engine, one) for one in wanted])
    for one, found in zip(wanted, together, strict=True):
        if one.sampling.temperature:
            assert found == await tokens(plain, one)
        else:
            expected = plain_greedy(list(one.prompt_token_ids), one.sampling.max_tokens)
            assert found == expected
    assert engine.stats().kv_cache.used_num_blocks == 0


@pytest.mark.parametrize("is_quick", [True, False])
async def test_a_stop_ends_a_request_whose_next_pass_is_launched_or_decided(
    is_quick: bool, make_engine: MakeEngine, plain_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots go to the next request, and what was computed too much is nowhere in that one."""
    monkeypatch.setattr(PlainForward, "is_quick", lambda *_: is_quick)
    engine = make_engine(pool_tokens=4 * BLOCK, max_batch_size=2)
    prompt = some_prompt(BLOCK)
    whole = plain_greedy(prompt, 12)
    stop = SamplingParams(max_tokens=12, stop_token_ids=(whole[4],))
    wanted = request(prompt, 12)
    stopped = type(wanted)("stopped", wanted.prompt_token_ids, stop)
    end = whole.index(whole[4])
    for seed in range(1, 6):
        assert (await tokens(engine, stopped))[: end + 1] == whole[: end + 1]
        other = some_prompt(3 * BLOCK - 2, seed)
        assert await tokens(engine, request(other, 6)) == plain_greedy(other, 6)
    assert engine.stats().kv_cache.used_num_blocks == 0


async def test_a_pass_that_fails_on_the_device_fails_its_requests_and_no_other(
    make_engine: MakeEngine, plain_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    choices, failing = LaunchedPass.choices, iter([False] * 5 + [True])

    def broken(launched: LaunchedPass) -> Any:
        if next(failing, False):
            raise RuntimeError("the device is on fire")
        return choices(launched)

    monkeypatch.setattr(LaunchedPass, "choices", broken)
    with pytest.raises(ModelError, match="on fire"):
        await tokens(engine, request(some_prompt(20), 30, ignore_eos=True))
    assert engine.stats().kv_cache.used_num_blocks == 0
    assert await tokens(engine, request(some_prompt(20), 6)) == plain_greedy(some_prompt(20), 6)


@pytest.mark.parametrize("failing", ["the last pass", "what is told after it"])
async def test_a_launch_that_fails_takes_nothing_from_the_pass_before_it(
    failing: str, make_engine: MakeEngine, plain_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends by that one is in the turn that fails, and has all that it asked for."""
    engine, prompt = make_engine(), some_prompt(13)
    launch, whole = Runner.launch, plain_greedy(prompt, 4)
    stop = SamplingParams(max_tokens=9, stop_token_ids=(whole[2],))
    wanted = request(prompt, 4, ignore_eos=True)
    if failing == "the last pass":
        wanted = type(wanted)("stopped", wanted.prompt_token_ids, stop)
        assert whole.index(whole[2]) == 2

    def broken(runner: Runner, turn: Turn, samplers: Any) -> Any:
        is_last = any(item.start == 15 for item in turn.items)
        if turn.ending or (is_last and failing == "the last pass"):
            raise RuntimeError("the device is on fire")
        return launch(runner, turn, samplers)

    monkeypatch.setattr(Runner, "launch", broken)
    found = await tokens(engine, wanted)
    assert found[:3] == whole[:3]
    assert engine.stats().kv_cache.used_num_blocks == 0


class FakeStream:
    """Notes which turn's end is waited for, by the number of turns that were put on it then."""

    def __init__(self) -> None:
        self.num_turns = 0
        self.waits: list[tuple[int, int]] = []

    def record_event(self) -> Any:
        self.num_turns += 1
        number = self.num_turns
        return SimpleNamespace(synchronize=lambda: self.waits.append((number, self.num_turns)))


def test_turns_that_choose_nothing_do_not_pile_up_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connector lets go of what a turn loads when another one is over."""
    stream = FakeStream()
    pool = allocate_pool(BlockLayout(1, 2, 1, BLOCK, 4, "float32"), 4, "cpu")
    runner = Runner(PlainForward.__new__(PlainForward), pool, None)
    monkeypatch.setattr(runner, "_is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for _ in range(4):
        assert runner.launch(Turn((), ()), {}) is None
    assert stream.waits == [(1, 2), (2, 3), (3, 4)]


async def test_a_connector_is_told_what_tensorrt_llm_s_overlapped_loop_tells(
    make_connected_engine: MakeEngine,
) -> None:
    """The newest token is not known: the first decoding turn has none, later ones lag by one."""
    pair = Pair()
    engine = make_connected_engine(pair)
    prompt = some_prompt(13)
    output = await tokens(engine, request(prompt, 4, ignore_eos=True))
    assert pair.made.reported() == [
        ("new", prompt, 2, 0, 13),
        ("old", [], 0, 12, 1),
        ("old", output[:1], 0, 13, 1),
        ("old", output[1:2], 0, 14, 1),
        ("old", output[2:3], 0, 15, 1),  # nothing is computed any more, but a block was completed
    ]


@pytest.mark.parametrize("num_tokens", range(1, 2 * BLOCK + 2))
async def test_the_same_blocks_are_saved_as_without(
    num_tokens: int, make_connected_engine: MakeEngine
) -> None:
    pairs = Pair(), Pair()
    wanted = request(some_prompt(BLOCK + 3), num_tokens, ignore_eos=True)
    for pair, off in zip(pairs, (False, True), strict=True):
        engine = make_connected_engine(pair, disable_overlap_scheduler=off)
        await tokens(engine, wanted)
        engine.close()
    ahead, plain = (pair.blocks for pair in pairs)
    assert ahead.keys() == plain.keys()
    assert all(torch.equal(ahead[name], plain[name]) for name in plain)
