"""Rewards of the rule and their baselines, by hand."""

import pytest
import torch

from lco_lite.feedback.rule import dead_groups, rule_rewards, subtract_baseline

REWARDS = rule_rewards([True, False, True, True])


def test_right_is_plus_one_and_wrong_is_minus_one():
    assert REWARDS.tolist() == [1, -1, 1, 1]


@pytest.mark.parametrize(
    ("baseline", "advantages"),
    [("none", [1, -1, 1, 1]), ("batch", [0.5, -1.5, 0.5, 0.5]), ("group", [1, -1, 0, 0])],
)
def test_baselines_subtract_the_mean_they_name(baseline, advantages):
    assert subtract_baseline(REWARDS, baseline, 2).tolist() == advantages


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="median"):
        subtract_baseline(REWARDS, "median", 2)


def test_groups_without_a_difference_are_counted():
    assert dead_groups(REWARDS, 2) == 0.5
    assert dead_groups(torch.ones(4), 2) == 1.0
