"""Whatever is packed together, the tokens are those of plain transformers."""

import asyncio

import pytest

from actors.engine import GenerationRequest, SamplingParams
from tests.engine.conftest import Greedy, MakeEngine, chunks, request, some_prompt, tokens
from tests.tiny_model import FAMILIES, make_tokenizer

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_output_of_every_family(
    family: str, make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    engine = make_engine(family)
    prompt = some_prompt(45)
    assert await tokens(engine, request(prompt, 40)) == plain_greedy(prompt, 40, family)


@pytest.mark.parametrize("max_num_tokens", [8, 20, 64])
async def test_greedy_output_of_chunked_prefill(
    max_num_tokens: int, make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    engine = make_engine(max_num_tokens=max_num_tokens)
    prompt = some_prompt(61)
    assert await tokens(engine, request(prompt)) == plain_greedy(prompt, 12)


@pytest.mark.parametrize("reuse", [True, False])
async def test_greedy_output_of_a_mixed_batch(
    reuse: bool, make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    engine = make_engine(max_num_tokens=48, reuse=reuse)
    prompts = [some_prompt(length, seed=length) for length in (1, 3, 17, 40, 100, 7, 8, 9)]
    prompts.append(prompts[3][:24] + prompts[5])  # shares three blocks with another
    outputs = await asyncio.gather(
        *[tokens(engine, request(p, 5 + 3 * i)) for i, p in enumerate(prompts)]
    )
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        assert output == plain_greedy(prompt, 5 + 3 * i)
    assert engine.stats().kv_cache.used_num_blocks == 0


SAMPLED = {"temperature": 1.5, "top_p": 0.95, "seed": 5}


async def test_sampled_tokens_do_not_depend_on_batch_mates(make_engine: MakeEngine) -> None:
    engine = make_engine()
    wanted = request(some_prompt(20), 30, **SAMPLED)
    alone = await tokens(engine, wanted)
    mates = [request(some_prompt(30, seed), 25, temperature=1, seed=seed) for seed in range(4)]
    together = await asyncio.gather(*[tokens(engine, r) for r in (*mates, wanted)])
    assert together[-1] == alone
    other_seed = request(some_prompt(20), 30, **(SAMPLED | {"seed": 6}))
    assert await tokens(engine, other_seed) != alone


async def test_without_a_seed_the_request_id_decides(make_engine: MakeEngine) -> None:
    engine = make_engine()
    same = [request(some_prompt(9), 20, request_id=i, temperature=2.0) for i in ("a", "a", "b")]
    first, again, other = [await tokens(engine, r) for r in same]
    assert first == again != other


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
async def test_another_replica_continues_without_a_break(
    settings: dict[str, float], make_engine: MakeEngine
) -> None:
    wanted = request(some_prompt(20), 30, ignore_eos=True, **settings)
    whole = await chunks(make_engine(), wanted)
    tokens_so_far = tuple(t for chunk in whole[:11] for t in chunk.token_ids)
    rest = await chunks(make_engine(), wanted.continued(tokens_so_far))
    assert [c.token_ids for c in rest] == [c.token_ids for c in whole[11:]]
    assert [c.text for c in rest] == [c.text for c in whole[11:]]
    assert rest[-1].finish_reason == "length"


async def test_chunks_add_up_to_the_text(make_engine: MakeEngine) -> None:
    received = await chunks(make_engine(), request(some_prompt(10), 50, ignore_eos=True))
    ids = [token for chunk in received for token in chunk.token_ids]
    text = "".join(chunk.text for chunk in received)
    assert len(ids) == 50
    assert text.replace("\ufffd", "") == TOKENIZER.decode(ids, skip_special_tokens=True).replace(
        "\ufffd", ""
    )
    assert [c.finish_reason for c in received] == [None] * 49 + ["length"]
    assert received[0].prefill_s > 0
    assert all(c.receipt is None for c in received[1:])


async def test_output_ends_with_an_end_token_unless_that_is_ignored(
    make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    prompt = some_prompt(12)
    output = plain_greedy(prompt, 12)
    engine = make_engine()
    received = await chunks(engine, request(prompt, 12, stop_token_ids=(output[5],)))
    assert [t for c in received for t in c.token_ids] == output[: output.index(output[5]) + 1]
    assert received[-1].finish_reason == "stop"


async def test_the_models_end_of_text_token(make_engine: MakeEngine, plain_greedy: Greedy) -> None:
    prompt = some_prompt(12)
    ends_with = plain_greedy(prompt, 12)[4]
    changes = {"eos_token_id": ends_with}
    engine = make_engine(changes=changes)
    output = await tokens(engine, request(prompt, 12))
    assert output == plain_greedy(prompt, 12, **changes)
    assert output[-1] == ends_with
    assert len(await tokens(engine, request(prompt, 12, ignore_eos=True))) == 12


async def test_a_stop_string_across_tokens_ends_the_output_before_it(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    wanted = request(some_prompt(10), 60, ignore_eos=True)
    text = "".join(chunk.text for chunk in await chunks(engine, wanted))
    at = next(i for i in range(5, len(text)) if "\ufffd" not in text[i : i + 3])
    stop = text[at : at + 3]
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, stop=("not there", stop))
    received = await chunks(engine, GenerationRequest("stop", wanted.prompt_token_ids, sampling))
    assert "".join(chunk.text for chunk in received) == text[: text.index(stop)]
    assert received[-1].finish_reason == "stop"


async def test_max_tokens_is_cut_to_the_room_that_is_left(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_tokens=64)
    received = await chunks(engine, request(some_prompt(50), 1000, ignore_eos=True))
    assert sum(len(chunk.token_ids) for chunk in received) == 14
    assert received[-1].finish_reason == "length"
