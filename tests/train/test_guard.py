import math

import pytest

from lco_lite.train.guard import Guard


def says(name: str, values, vocab_size=None) -> list[int]:
    """At which steps (from 0) a series of one metric is warned about."""
    guard = Guard(vocab_size)
    return [i for i, value in enumerate(values) if guard.check({name: value})]


@pytest.mark.parametrize(
    ("name", "healthy"),
    [
        ("entropy", [0.8, 0.5, 0.2, 0.1, 0.05]),
        ("accuracy", [0.3, 0.25, 0.2, 0.5, 0.8]),
        ("reward", [-0.4, -0.5, -0.3, -0.45, 0.2, 0.6]),
        ("mean_response_tokens", [40, 30, 20, 15, 80]),
        ("truncated", [0.0, 0.1, 0.5]),
        ("grad_norm", [3.0, 12.0, 2.0, 15.0, 11.0, 1.0]),
    ],
)
def test_a_healthy_course_is_passed_in_silence(name, healthy):
    assert says(name, healthy, vocab_size=1000) == []


@pytest.mark.parametrize(
    ("name", "course", "at"),
    [
        ("entropy", [0.8, 0.1, 0.009], [2]),
        ("entropy", [5.0, 0.1, 0.04], [2]),
        ("entropy", [0.8, 5.0, 5.6], [2]),
        ("accuracy", [0.4, 0.25, 0.19], [2]),
        ("reward", [0.10, 0.12, 0.11, 0.09, 0.04], [4]),
        ("reward", [0.01, -0.01, 0.0, -0.02, -0.1], [4]),
        ("mean_response_tokens", [40, 20, 9], [2]),
        ("truncated", [0.1, 0.6], [1]),
        ("grad_norm", [11.0, 12.0, 13.0], [2]),
    ],
)
def test_a_collapse_is_said_at_the_step_where_it_shows(name, course, at):
    assert says(name, course, vocab_size=1000) == at


def test_each_is_said_once_until_it_recovered():
    assert says("truncated", [0.6, 0.7, 0.9, 0.2, 0.8, 0.9]) == [0, 4]


def test_the_warning_says_what_was_what_is_and_what_to_do():
    guard = Guard()
    guard.check({"accuracy": 0.4})
    (warning,) = guard.check({"accuracy": 0.1})
    for part in ("accuracy", "0.100", "0.400", "rl.lr"):
        assert part in warning


def test_several_collapses_are_said_together():
    guard = Guard(vocab_size=100)
    guard.check({"entropy": 1.0, "mean_response_tokens": 100.0, "accuracy": 0.5})
    warnings = guard.check({"entropy": 4.5, "mean_response_tokens": 3.0, "accuracy": 0.0, "truncated": 1.0})
    assert len(warnings) == 4


def test_a_reward_on_a_scale_of_its_own_is_not_judged_where_the_accuracy_is_known():
    guard = Guard()
    for reward in (1.0, 1.0, 1.0, -9.0):
        assert guard.check({"reward": reward, "accuracy": 0.5}) == []


def test_what_is_missing_or_not_finite_is_no_evidence():
    guard = Guard(vocab_size=100)
    guard.check({"entropy": 1.0})
    for value in (None, math.nan, math.inf):
        assert guard.check({"entropy": value, "grad_norm": value}) == []
    assert guard.check({}) == []


def test_without_a_vocabulary_high_entropy_is_not_judged():
    assert says("entropy", [1.0, 11.0]) == []


def test_a_resumed_stage_that_is_shown_the_steps_before_judges_as_if_never_stopped():
    course = [{"accuracy": a} for a in (0.8, 0.7, 0.6)]
    guard = Guard()
    for metrics in course:
        guard.check(metrics)
    assert guard.check({"accuracy": 0.3}) != [] and Guard().check({"accuracy": 0.3}) == []
