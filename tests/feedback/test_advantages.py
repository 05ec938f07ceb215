"""Baselines, scaling, GAE and penalties against their definitions, by hand or in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lco_lite.feedback.advantages import (
    at_last_token,
    divide_by_group_std,
    fill_inapplicable,
    gae,
    live_groups,
    overlong_penalty,
    subtract_baseline,
    whiten,
)

REWARDS = torch.tensor([1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("baseline", "advantages"),
    [
        ("none", [1, -1, 1, 1]),
        ("batch", [0.5, -1.5, 0.5, 0.5]),
        ("group", [1, -1, 0, 0]),
        ("leave_one_out", [2, -2, 0, 0]),
    ],
)
def test_baselines_subtract_the_mean_they_name(baseline, advantages):
    assert subtract_baseline(REWARDS, baseline, 2).tolist() == advantages


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="median"):
        subtract_baseline(REWARDS, "median", 2)


def test_groups_without_a_difference_are_found():
    assert live_groups(REWARDS, 2).tolist() == [True, False]


def test_scaling_divides_by_the_groups_sample_deviation():
    scaled = divide_by_group_std(torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0]), 2)
    assert scaled.tolist() == pytest.approx([2**-0.5, -(2**-0.5)], rel=1e-3)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0.5, 1.0), st.floats(0.0, 1.0), st.integers(0, 99)
)
def test_gae_is_the_sum_of_discounted_residuals_within_each_response(lengths, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    rewards, values = torch.randn(2, len(rows), generator=generator, dtype=torch.float64)
    found = gae(rewards, values, rows, gamma, lam)
    start = 0
    for n in lengths:
        r, v = rewards[start : start + n], torch.cat([values[start : start + n], torch.zeros(1, dtype=torch.float64)])
        delta = r + gamma * v[1:] - v[:-1]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        torch.testing.assert_close(found[start : start + n], torch.stack(expected))
        start += n


def test_without_values_and_discount_gae_is_the_reward_to_come():
    rows, rewards = torch.tensor([0, 0, 0, 1]), torch.tensor([0.0, 0.0, 1.0, -1.0])
    assert gae(rewards, torch.zeros(4), rows, 1.0, 1.0).tolist() == [1, 1, 1, -1]


def test_a_responses_reward_arrives_with_its_last_token():
    assert at_last_token(torch.tensor([1.0, -1.0]), torch.tensor([0, 0, 1])).tolist() == [0, 1, -1]


def test_whitening_gives_mean_0_and_deviation_1():
    white = whiten(torch.tensor([1.0, 2.0, 6.0]))
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_overlong_penalty_falls_from_0_to_minus_1_over_the_buffer():
    lengths = torch.tensor([10.0, 80.0, 90.0, 100.0])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -1])


@given(st.floats(-100, 100, width=32), st.integers(2, 9), st.integers(1, 4))
def test_equal_rewards_give_exactly_0_and_leave_other_groups_alone(reward, group, others):
    equal, live = torch.full((group,), reward), torch.arange(float(group * others))
    assert not subtract_baseline(equal, "batch", group).any()
    for baseline in ("group", "leave_one_out"):
        both = subtract_baseline(torch.cat([equal, live]), baseline, group)
        assert not both[:group].any()
        assert torch.equal(both[group:], subtract_baseline(live, baseline, group)) and both[group:].any()


@pytest.mark.parametrize("baseline", ["batch", "group", "leave_one_out"])
def test_a_reward_that_does_not_apply_has_no_advantage_and_moves_no_baseline(baseline):
    nan = float("nan")
    rewards = torch.tensor([1.0, nan, 3.0, nan, nan, nan])
    filled = fill_inapplicable(rewards, baseline, 3)
    advantages = subtract_baseline(filled, baseline, 3)
    assert advantages[[1, 3, 4, 5]].tolist() == [0.0] * 4
    assert advantages[0] == -advantages[2] != 0
    assert fill_inapplicable(torch.tensor([1.0, nan]), "none", 1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
@pytest.mark.parametrize("group", [4, 8])
def test_equal_rewards_beside_one_that_does_not_apply_have_no_signal_at_all(baseline, group):
    for value in torch.rand(50, generator=torch.Generator().manual_seed(group)):
        rewards = value.repeat(group).index_fill(0, torch.tensor([1]), float("nan"))
        assert not subtract_baseline(fill_inapplicable(rewards, baseline, group), baseline, group).any()
