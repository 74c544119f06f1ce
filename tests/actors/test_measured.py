"""Speeds that are learnt from reports: wrong defaults are left, good ones are kept."""

import random

import pytest

from actors.routing import FirstToken, MeasuredSpeeds, Speeds
from actors.routing.fitting import RunningFit

LAPTOP = Speeds(
    prefill_base_s=0.02,
    prefill_token_s=1.6e-3,
    prefill_pair_s=1e-7,
    host_token_s=2e-5,
    store_token_s=2e-4,
    decode_slowdown=2e-5,
    overhead_s=0.03,
)


def report(rng: random.Random, truth: Speeds, own_figure: bool) -> FirstToken:
    computed, cached = rng.randint(1, 3000), rng.choice([0, 500, 2000])
    running = rng.choice([0, 0, 1000, 5000])
    shared = cached if rng.random() < 0.5 else 0
    prefill_s = truth.prefill_s(computed, cached) * (1 + truth.decode_slowdown * running)
    load_s = shared * truth.store_token_s + (cached - shared) * truth.host_token_s
    return FirstToken(
        service_s=(truth.overhead_s + load_s + prefill_s) * rng.uniform(0.97, 1.03),
        computed_tokens=computed,
        cached_tokens=cached,
        host_tokens=cached - shared,
        shared_tokens=shared,
        running_kv_tokens=running,
        prefill_s=prefill_s * rng.uniform(0.97, 1.03) if own_figure else None,
        is_alone=True,
    )


def test_defaults_hold_before_the_first_measurement():
    assert MeasuredSpeeds(LAPTOP).speeds == LAPTOP


@pytest.mark.parametrize("own_figure", [True, False], ids=["engine's figure", "times alone"])
def test_a_machine_fifty_times_slower_than_the_defaults_is_known_soon(own_figure):
    rng, measured = random.Random(3), MeasuredSpeeds()
    for _ in range(300):
        measured.first_token(report(rng, LAPTOP, own_figure))
    now = measured.speeds
    for computed, cached in ((200, 0), (1000, 2000), (3000, 0)):
        predicted_s, real_s = now.prefill_s(computed, cached), LAPTOP.prefill_s(computed, cached)
        assert predicted_s == pytest.approx(real_s, rel=0.1, abs=0.04)
    if own_figure:
        assert now.store_token_s == pytest.approx(LAPTOP.store_token_s, rel=0.3)
        assert now.decode_slowdown == pytest.approx(LAPTOP.decode_slowdown, rel=0.3)


def test_means_follow_what_ends():
    measured = MeasuredSpeeds()
    for _ in range(100):
        measured.finished(stream_s=2.0, output_tokens=50)
    assert measured.speeds.stream_s == pytest.approx(2.0, rel=0.05)
    assert measured.speeds.output_tokens == pytest.approx(50, rel=0.05)


def test_nonsense_is_not_learnt():
    measured = MeasuredSpeeds(LAPTOP)
    measured.first_token(FirstToken(service_s=-1.0, computed_tokens=10, cached_tokens=0))
    assert measured.speeds == LAPTOP


def test_a_fit_keeps_what_it_cannot_tell_apart_in_proportion():
    fit = RunningFit((1.0, 1.0))
    for _ in range(50):
        fit.learn((1.0, 1.0), 6.0, 0.1)
    assert fit.coefficients == pytest.approx((3.0, 3.0), rel=0.02)
    assert fit.predict((1.0, 1.0)) == pytest.approx(6.0, rel=0.02)


def test_a_fit_has_no_negative_coefficients():
    fit = RunningFit((1.0, 1.0))
    for x in range(1, 60):
        fit.learn((1.0, float(x)), 10.0 - 0.1 * x, 0.1)
    assert min(fit.coefficients) >= 0.0


def test_a_fit_is_stable_for_ever():
    """The recursive form of least squares is not: rounding makes it diverge."""
    rng, fit = random.Random(5), RunningFit((1.0, 1e-3, 1e-6, 1e-3), memory=100)
    for count in range(12_000):
        x = rng.lognormvariate(6, 1)
        y = 2.0 + 3e-3 * x + 2e-6 * x * x
        fit.learn((1.0, x, x * x, 0.0), y * rng.uniform(0.98, 1.02), 0.1 * y)
        if count > 200:
            assert fit.predict((1.0, 500.0, 250_000.0, 0.0)) == pytest.approx(4.0, rel=0.1)
    assert fit.coefficients[3] == pytest.approx(1e-3), "never seen: as believed before"
