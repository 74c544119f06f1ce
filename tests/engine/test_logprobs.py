"""Log-probabilities: those of plain transformers, whatever draws, drafts and replicas do."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine import GenerationRequest, SamplingParams, TokenLogprob
from actors.engines.torch.engine import TorchEngine
from tests.engine.conftest import MakeEngine, ModelPath
from tests.engine.test_drafts import NGRAM, REPEATING

PROMPT = (5, 9, 5, 9, 5, 9, 5, 9, 5)
NUM_TOP = 3


async def noted(engine: TorchEngine, request: GenerationRequest) -> list[tuple[int, TokenLogprob]]:
    pairs: list[tuple[int, TokenLogprob]] = []
    async for chunk in engine.generate(request):
        pairs += zip(chunk.token_ids, chunk.logprobs, strict=True)
    return pairs


def asked(**sampling: float | int | None) -> GenerationRequest:
    settings = {"max_tokens": 16, "ignore_eos": True, "logprobs": NUM_TOP, "seed": 3, **sampling}
    return GenerationRequest("request", PROMPT, SamplingParams(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafts", [None, NGRAM])
async def test_they_are_those_of_the_model(
    make_engine: MakeEngine,
    model_path: ModelPath,
    temperature: float,
    drafts: dict[str, Any] | None,
) -> None:
    engine = make_engine(changes=REPEATING, speculative_config=drafts)
    pairs = await noted(engine, asked(temperature=temperature))
    tokens = [token for token, _ in pairs]
    model = AutoModelForCausalLM.from_pretrained(model_path(**REPEATING)).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    top = expected.topk(NUM_TOP)
    for place, (token, one) in enumerate(pairs):
        assert one.logprob == pytest.approx(float(expected[place, token]), abs=1e-3)
        assert [other for other, _ in one.top] == top.indices[place].tolist()
        assert [p for _, p in one.top] == pytest.approx(top.values[place].tolist(), abs=1e-3)
    plain = [
        token
        async for chunk in engine.generate(asked(temperature=temperature, logprobs=None))
        for token in chunk.token_ids
    ]
    assert plain == tokens, "asking for them changes no token"


async def test_they_go_on_where_the_stream_stopped(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = asked(temperature=0.7)
    whole = await noted(engine, request)
    rest = await noted(engine, request.continued(tuple(token for token, _ in whole[:7])))
    assert [token for token, _ in rest] == [token for token, _ in whole[7:]]
    for (_, one), (_, other) in zip(rest, whole[7:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


async def test_none_but_the_tokens_own_when_zero_are_asked_for(make_engine: MakeEngine) -> None:
    pairs = await noted(make_engine(), asked(logprobs=0, temperature=0.0))
    assert len(pairs) == 16
    assert all(one.top == () and one.logprob <= 0 for _, one in pairs)
