"""Drawing tokens: the right distribution, and the same draw wherever it is made."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engine import GenerationRequest, SamplingParams
from actors.engines.requests import check_sampling, seed_of
from actors.engines.torch.sampling import sample, uniform
from shared_cache.errors import RequestError

LOGITS = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()
NUM_DRAWS = 4000


def shares(params: SamplingParams, logits: torch.Tensor = LOGITS) -> list[float]:
    draws = [sample(logits, params, 7, position) for position in range(NUM_DRAWS)]
    return [draws.count(token) / NUM_DRAWS for token in range(len(logits))]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=1), [0.5, 0.1, 0.25, 0.15]),
        (SamplingParams(temperature=0.5), [0.7246, 0.029, 0.1812, 0.0652]),
        (SamplingParams(temperature=1, top_k=2), [2 / 3, 0, 1 / 3, 0]),
        (SamplingParams(temperature=1, top_p=0.75), [2 / 3, 0, 1 / 3, 0]),
        (SamplingParams(temperature=1, top_p=0.76), [0.5556, 0, 0.2778, 0.1667]),
        (SamplingParams(temperature=1, top_k=3, top_p=0.5), [1, 0, 0, 0]),
        (SamplingParams(temperature=1, top_p=1e-9), [1, 0, 0, 0]),
        (SamplingParams(temperature=1e-30), [1, 0, 0, 0]),
    ],
)
def test_the_shares_of_the_draws(params: SamplingParams, expected: list[float]) -> None:
    assert shares(params) == pytest.approx(expected, abs=0.03)


def test_a_wide_nucleus_is_ranked_whole() -> None:
    logits = torch.zeros(5000)
    params = SamplingParams(temperature=1, top_p=0.9)
    draws = {sample(logits, params, 1, position) for position in range(3000)}
    assert len(draws) > 1500  # far beyond the tokens that are ranked at first


@given(st.integers(0, 2**63), st.integers(0, 10**6))
def test_a_draw_depends_on_seed_and_position_alone(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)
    assert uniform(seed, position) != uniform(seed, position + 1)


def test_draws_are_pinned_for_every_version() -> None:
    assert uniform(1, 2) == pytest.approx(PINNED_UNIFORM, abs=1e-15)
    assert seed_of(GenerationRequest("request", (1,))) == PINNED_SEED


PINNED_UNIFORM = 0.6957842006978575
PINNED_SEED = 10201474900411090615


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ("a", "")}, "stop string"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        check_sampling(replace(SamplingParams(), **change))
