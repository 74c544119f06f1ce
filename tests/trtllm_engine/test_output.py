"""What comes out of a TensorRT-LLM engine: the same rules as the embedded engine's."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from actors.engine import GenerationRequest, Receipt, SamplingParams, TokenLogprob
from actors.engines.trtllm.sampling import token_logprob
from shared_cache.errors import ReplicaUnavailableError, RequestError
from shared_cache.hashing import ReuseScope
from tests.tiny_model import make_tokenizer
from tests.trtllm_engine.conftest import (
    BLOCK,
    MakeEngine,
    chunks,
    request,
    some_prompt,
    until,
)
from tests.trtllm_engine.llm import END, FakeLLM, next_token

TOKENIZER = make_tokenizer()


def expected(prompt: list[int], num_tokens: int, ends: frozenset[int]) -> list[int]:
    said: list[int] = []
    while len(said) < num_tokens and not (said and said[-1] in ends):
        said.append(next_token(prompt + said, ends))
    return said


async def test_tokens_and_text_come_as_they_are_made(make_engine: MakeEngine) -> None:
    prompt = some_prompt(10)
    got = await chunks(make_engine(), request(prompt, 12, ignore_eos=True))
    tokens = [token for chunk in got for token in chunk.token_ids]
    assert tokens == expected(prompt, 12, frozenset())
    assert "".join(chunk.text for chunk in got) == TOKENIZER.decode(tokens)
    assert [chunk.finish_reason for chunk in got] == [None] * (len(got) - 1) + ["length"]
    assert got[0].receipt == Receipt(10, 0, 0, 0, 10)
    assert all(chunk.receipt is None for chunk in got[1:])


@pytest.mark.parametrize("says_end_token", [True, False])
async def test_an_end_token_ends_it_and_says_nothing(
    make_engine: MakeEngine, trtllm: type[FakeLLM], says_end_token: bool
) -> None:
    trtllm.says_end_token = says_end_token
    prompt = next(p for seed in range(99) if END in expected(p := some_prompt(9, seed), 20, {END}))
    got = await chunks(make_engine(), request(prompt, 20))
    wanted = expected(prompt, 20, frozenset({END}))
    tokens = [token for chunk in got for token in chunk.token_ids]
    assert tokens == (wanted if says_end_token else wanted[:-1])
    assert got[-1].finish_reason == "stop"
    assert "".join(chunk.text for chunk in got) == TOKENIZER.decode(wanted[:-1])


async def test_a_stop_token_of_the_request_ends_it_and_is_part_of_it(
    make_engine: MakeEngine,
) -> None:
    for seed in range(99):
        prompt = some_prompt(9, seed)
        stop = expected(prompt, 12, frozenset())[4]
        ends = frozenset({0, stop})  # TensorRT-LLM takes the one as an end, the other as a word
        wanted = expected(prompt, 12, ends)
        if wanted[-1] == stop:
            break
    stopping = request(prompt, 12, ignore_eos=True, stop_token_ids=(0, stop))
    got = await chunks(make_engine(), stopping)
    assert [token for chunk in got for token in chunk.token_ids] == wanted
    assert got[-1].finish_reason == "stop"


async def test_a_stop_string_ends_it_and_aborts_the_request(
    make_engine: MakeEngine, trtllm: type[FakeLLM]
) -> None:
    prompt = some_prompt(9, seed=4)
    text = TOKENIZER.decode(expected(prompt, 40, frozenset()))
    stop = text[7:10]
    trtllm.turn_s = 0.01
    engine = make_engine()
    got = await chunks(engine, request(prompt, 40, ignore_eos=True, stop=(stop,)))
    assert got[-1].finish_reason == "stop"
    assert "".join(chunk.text for chunk in got) == text[: text.index(stop)]
    await until(lambda: not trtllm.last.results)
    assert len(trtllm.last.aborted) == 1
    await until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)


@pytest.mark.parametrize("tokens_per_turn", [1, 3])
async def test_a_stream_goes_on_where_another_replica_stopped(
    make_engine: MakeEngine, trtllm: type[FakeLLM], tokens_per_turn: int
) -> None:
    trtllm.tokens_per_turn = tokens_per_turn
    engine, prompt = make_engine(), some_prompt(9, seed=2)
    whole_request = request(prompt, 20, ignore_eos=True, stop=("\ufffd\ufffd never",))
    whole = await chunks(engine, whole_request)
    for so_far in range(1, 20, 3):
        tokens = [token for chunk in whole for token in chunk.token_ids][:so_far]
        text = ""
        for chunk in whole:
            if sum(len(c.token_ids) for c in whole[: whole.index(chunk) + 1]) > so_far:
                break
            text += chunk.text
        rest = await chunks(engine, whole_request.continued(tuple(tokens)))
        all_tokens = tokens + [token for chunk in rest for token in chunk.token_ids]
        assert all_tokens == [token for chunk in whole for token in chunk.token_ids]
        if tokens_per_turn == 1:
            rest_text = "".join(chunk.text for chunk in rest)
            assert text + rest_text == "".join(chunk.text for chunk in whole)


async def test_drafts_are_counted_from_the_tokens_of_a_turn(
    make_engine: MakeEngine, trtllm: type[FakeLLM]
) -> None:
    trtllm.tokens_per_turn = 4
    engine = make_engine(speculative_config={"max_draft_len": 4})
    got = await chunks(engine, request(some_prompt(9), 10, ignore_eos=True))
    assert [chunk.num_accepted for chunk in got] == [3, 3, 1]
    assert engine.stats().accepted_draft_tokens == 7


async def test_who_stops_reading_ends_the_request(
    make_engine: MakeEngine, trtllm: type[FakeLLM]
) -> None:
    trtllm.turn_s = 0.01
    engine = make_engine()
    async with aclosing(engine.generate(request(some_prompt(9), 10**6, ignore_eos=True))) as stream:
        await anext(stream)
        assert engine.stats().num_running == 1
    await until(lambda: len(trtllm.last.aborted) == 1)
    await until(lambda: not trtllm.last.results)
    await until(lambda: engine.stats().num_running == 0)


async def test_streams_of_several_event_loops(make_engine: MakeEngine) -> None:
    engine, prompt = make_engine(), some_prompt(9)
    wanted = request(prompt, 6, ignore_eos=True)
    here = await chunks(engine, wanted)
    there = await asyncio.to_thread(lambda: asyncio.run(chunks(engine, wanted)))
    assert [c.token_ids for c in here] == [c.token_ids for c in there]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_token_ids": ()}, "empty"),
        ({"prompt_token_ids": (999,)}, "vocabulary of 259"),
        ({"prompt_token_ids": tuple(some_prompt(512))}, "may have 512"),
        ({"scope": ReuseScope(lora_id="x")}, "LoRA"),
        ({"sampling": SamplingParams(top_p=2)}, "top_p"),
        ({"num_output_so_far": 8}, "num_output_so_far"),
    ],
)
async def test_what_can_never_be_served_is_refused_before_it_is_sent(
    make_engine: MakeEngine, trtllm: type[FakeLLM], change: dict[str, object], named: str
) -> None:
    engine = make_engine()
    sent = trtllm.last.num_submitted
    with pytest.raises(RequestError, match=named):
        await chunks(engine, replace(request(some_prompt(9)), **change))
    assert trtllm.last.num_submitted == sent


async def test_a_prompt_that_must_be_computed_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_tokens=64, llm_args={"enable_chunked_prefill": False})
    with pytest.raises(RequestError, match="without chunked prefill this engine takes 64"):
        await chunks(engine, request(some_prompt(65)))
    assert await chunks(engine, request(some_prompt(64)))


async def test_an_output_ends_where_the_pool_does(make_engine: MakeEngine) -> None:
    engine = make_engine()
    got = await chunks(engine, request(some_prompt(500), 100, ignore_eos=True))
    assert sum(len(chunk.token_ids) for chunk in got) == 12
    assert got[-1].finish_reason == "length"


async def test_a_failed_pass_fails_the_request_and_not_the_engine(
    make_engine: MakeEngine, trtllm: type[FakeLLM]
) -> None:
    engine = make_engine()
    trtllm.last.fails_with = ValueError("CUDA error")
    with pytest.raises(ReplicaUnavailableError, match="CUDA error"):
        await chunks(engine, request(some_prompt(9)))
    trtllm.last.fails_with = None
    assert engine.is_alive()
    assert await chunks(engine, request(some_prompt(9)))


async def test_an_engine_that_closes_aborts_what_runs(
    make_engine: MakeEngine, trtllm: type[FakeLLM]
) -> None:
    trtllm.turn_s = 0.01
    engine = make_engine()
    stream = engine.generate(request(some_prompt(9), 10**6, ignore_eos=True))
    await anext(stream)
    await asyncio.to_thread(engine.close)
    rest = [chunk async for chunk in stream]
    assert rest[-1].finish_reason == "abort"
    assert not engine.is_alive()
    with pytest.raises(ReplicaUnavailableError, match="closed"):
        await chunks(engine, request(some_prompt(9)))
    engine.close()


async def test_a_prompt_s_salt_is_handed_on(make_engine: MakeEngine) -> None:
    engine, prompt = make_engine(), tuple(some_prompt(2 * BLOCK + 1))
    first = GenerationRequest("1", prompt, SamplingParams(2), ReuseScope("tenant"))
    await chunks(engine, first)
    (again, *_) = await chunks(engine, first)
    (other, *_) = await chunks(engine, replace(first, scope=ReuseScope("another")))
    assert again.receipt is not None
    assert again.receipt.cached == 2 * BLOCK
    assert other.receipt == Receipt(len(prompt), 0, 0, 0, len(prompt))


async def test_log_probabilities_come_with_their_tokens(make_engine: MakeEngine) -> None:
    got = await chunks(make_engine(), request(some_prompt(10), 6, ignore_eos=True, logprobs=2))
    pairs = [pair for one in got for pair in zip(one.token_ids, one.logprobs, strict=True)]
    assert len(pairs) == 6
    for token, noted in pairs:
        assert noted == TokenLogprob(-1.5, ((token + 1, -0.5), (token + 2, -1.0)))
    none_asked = await chunks(make_engine(), request(some_prompt(10), 2, ignore_eos=True))
    assert all(chunk.logprobs == () for chunk in none_asked)


def test_a_token_whose_probability_is_not_told_has_openais_word_for_it() -> None:
    assert token_logprob({}, 5, 1) == TokenLogprob(-9999.0, ())
