"""N-gram drafts change the speed and nothing else."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.engines.torch.engine import TorchEngine
from shared_cache.config import CacheConfig
from tests.engine.conftest import HOST, Greedy, MakeEngine, chunks, request, some_prompt, tokens

NGRAM = {"decoding_type": "NGram", "max_draft_len": 6, "max_matching_ngram_size": 2}
# A tied output layer makes a random model repeat itself, so that drafts are accepted.
REPEATING = {"tie_word_embeddings": True, "initializer_range": 0.1}


@pytest.fixture
def engines(make_engine: MakeEngine) -> Iterator[tuple[TorchEngine, TorchEngine]]:
    return (
        make_engine(changes=REPEATING, speculative_config=NGRAM),
        make_engine(changes=REPEATING),
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    phrase=st.lists(st.integers(3, 258), min_size=1, max_size=8),
    times=st.integers(1, 5),
    num_tokens=st.integers(1, 30),
)
def test_output_is_the_plain_greedy_output(
    engines: tuple[TorchEngine, TorchEngine], phrase: list[int], times: int, num_tokens: int
) -> None:
    wanted = request(phrase * times, num_tokens)
    drafted, plain = [asyncio.run(tokens(engine, wanted)) for engine in engines]
    assert drafted == plain


async def test_drafts_are_accepted_and_counted(make_engine: MakeEngine) -> None:
    engine = make_engine(changes=REPEATING, speculative_config=NGRAM)
    received = await chunks(engine, request(some_prompt(5) * 4, 60, ignore_eos=True))
    accepted = sum(chunk.num_accepted for chunk in received)
    stats = engine.stats()
    assert stats.accepted_draft_tokens == accepted >= 20
    assert stats.proposed_draft_tokens >= accepted
    assert len(received) == stats.num_turns == 60 - accepted
    assert all(chunk.num_accepted < len(chunk.token_ids) for chunk in received[:-1])


async def test_sampled_output_is_the_same_with_drafts(make_engine: MakeEngine) -> None:
    wanted = request(some_prompt(5) * 4, 60, temperature=0.2, seed=3, ignore_eos=True)
    drafting = make_engine(changes=REPEATING, speculative_config=NGRAM)
    plain = make_engine(changes=REPEATING)
    assert await tokens(drafting, wanted) == await tokens(plain, wanted)
    assert drafting.stats().accepted_draft_tokens > 10


async def test_drafts_and_sharing_work_together(
    make_engine: MakeEngine, plain_greedy: Greedy, tmp_path: Path
) -> None:
    cache = CacheConfig(store=f"file://{tmp_path}", host=HOST)
    prompt = some_prompt(10) * 4
    expected = plain_greedy(prompt, 50, **REPEATING)
    for _ in range(2):
        engine = make_engine(changes=REPEATING, speculative_config=NGRAM, cache=cache)
        wanted = [request(prompt, 50), request(prompt[5:], 50), request(prompt, 20)]
        outputs = await asyncio.gather(*[tokens(engine, r) for r in wanted])
        assert outputs[0] == expected
        assert outputs[1] == plain_greedy(prompt[5:], 50, **REPEATING)
        assert outputs[2] == expected[:20]
        assert engine.stats().accepted_draft_tokens > 0
        engine.close()


async def test_an_end_within_a_draft_ends_the_output_there(make_engine: MakeEngine) -> None:
    engine = make_engine(changes=REPEATING, speculative_config=NGRAM)
    wanted = request(some_prompt(5) * 4, 60, ignore_eos=True)
    received = await chunks(engine, wanted)
    drafted = next(c for c in received if c.num_accepted >= 3)
    output = [t for c in received for t in c.token_ids]
    end = drafted.token_ids[1]
    stopping = await chunks(
        engine, request(some_prompt(5) * 4, 60, ignore_eos=True, stop_token_ids=(end,))
    )
    assert [t for c in stopping for t in c.token_ids] == output[: output.index(end) + 1]
    assert stopping[-1].num_accepted <= len(stopping[-1].token_ids)
    assert engine.stats().kv_cache.used_num_blocks == 0
