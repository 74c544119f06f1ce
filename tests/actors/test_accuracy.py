"""When what is believed of a replica's cache is used, and what is told of predictions."""

import pytest

from actors.routing.accuracy import MIN_PREDICTIONS, Accuracy


def wrong(accuracy: Accuracy, times: int, now_s: float = 0.0) -> None:
    for _ in range(times):
        accuracy.note_tokens(100, 0, now_s)


def test_a_few_wrong_predictions_conclude_nothing():
    accuracy = Accuracy()
    wrong(accuracy, MIN_PREDICTIONS - 1)
    assert not accuracy.is_load_only(0.0)
    wrong(accuracy, 1)
    assert accuracy.is_load_only(0.0)


def test_prompts_of_which_nothing_was_believed_say_nothing():
    accuracy = Accuracy()
    for _ in range(100):
        accuracy.note_tokens(0, 0, 0.0)
        accuracy.note_tokens(50, 80, 0.0)  # more than was believed is no harm
    assert accuracy.snapshot(0.0).missing == 0.0


def test_it_recovers_by_right_predictions_or_by_time_and_can_fall_again():
    accuracy = Accuracy()
    wrong(accuracy, 20)
    assert accuracy.is_load_only(10.0)
    assert not accuracy.is_load_only(200.0), "nobody asked it for anything for minutes"
    wrong(accuracy, 20, 200.0)
    assert accuracy.is_load_only(200.0)
    for _ in range(20):
        accuracy.note_tokens(100, 100, 200.0)
    assert not accuracy.is_load_only(200.0)
    assert accuracy.snapshot(200.0).num_demotions == 2


def test_a_replica_that_is_believed_in_does_not_become_better_by_waiting():
    accuracy = Accuracy()
    for _ in range(20):
        accuracy.note_tokens(100, 60, 0.0)
    assert accuracy.snapshot(1e6).missing == pytest.approx(0.4, abs=0.05)


def test_errors_of_first_tokens_are_told_with_and_without_sign():
    accuracy = Accuracy()
    for _ in range(50):
        accuracy.note_first_token(1.0, 1.5)
        accuracy.note_first_token(1.0, 0.5)
    told = accuracy.snapshot(0.0)
    assert told.ttft_error_s == pytest.approx(0.5)
    assert abs(told.ttft_bias_s) < 0.1
    assert told.num_predictions == 100
