"""The oracle itself: the paper's equations on logits, against their definitions and derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lco_lite.objectives import reference

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, st.floats(0.2, 5.0))
def test_optimal_logits_give_the_old_policy_tilted_by_the_exponential_advantage(seed: int, beta: float) -> None:
    old, advantages = draw(seed, 2, 3, 8)
    tilted = torch.softmax(old, -1) * torch.exp(advantages / beta)  # eq 6
    policy = torch.softmax(reference.optimal_logits(old, advantages, beta), -1)
    torch.testing.assert_close(policy, tilted / tilted.sum(-1, keepdim=True))


@given(seeds, st.floats(0.2, 5.0))
def test_optimal_policy_beats_every_other_at_the_regularised_objective(seed: int, beta: float) -> None:
    old, advantages, other = draw(seed, 3, 8)

    def value(logits: Tensor) -> Tensor:  # eq 2
        log_p = torch.log_softmax(logits, -1)
        return (log_p.exp() * (advantages - beta * (log_p - torch.log_softmax(old, -1)))).sum(-1)

    best = reference.optimal_logits(old, advantages, beta)
    assert value(best) >= value(best + 0.1 * other)
    assert value(best) > value(other)


@given(seeds)
def test_the_centred_advantage_leaves_the_mean_logit_alone(seed: int) -> None:
    old, advantages = draw(seed, 2, 5, 8)
    torch.testing.assert_close(reference.optimal_logits(old, advantages, 0.7).mean(-1), old.mean(-1))


@given(seeds)
def test_gradients_are_those_of_the_paper(seed: int) -> None:
    logits, target = draw(seed, 2, 3, 8)
    logits.requires_grad_()
    r = (target - logits).detach()
    expected = {
        reference.mse: -2 * r / 8,  # eq 44
        reference.lch: -torch.tanh(r) / 8,  # eq 44
        reference.kld: (torch.softmax(logits, -1) - torch.softmax(target, -1)).detach(),  # eq 47
    }
    for loss, gradient in expected.items():
        torch.testing.assert_close(torch.autograd.grad(loss(logits, target).sum(), logits)[0], gradient)


@given(seeds, st.floats(-50, 50))
def test_a_constant_on_the_logits_changes_neither_kld_nor_the_policy_weighting(seed: int, constant: float) -> None:
    logits, target, old = draw(seed, 3, 3, 8)
    torch.testing.assert_close(reference.kld(logits, target + constant), reference.kld(logits, target))
    for loss in (reference.mse, reference.lch):
        shifted = loss(logits, target + constant, "policy", old)
        torch.testing.assert_close(shifted, loss(logits, target, "policy", old))


@given(seeds)
def test_policy_weighted_mse_is_twice_the_divergence_to_second_order(seed: int) -> None:
    old, step = draw(seed, 2, 8)
    target = old + 1e-4 * step
    torch.testing.assert_close(
        reference.mse(old, target, "policy", old), 2 * reference.kld(old, target), rtol=1e-2, atol=1e-14
    )


def test_log_cosh_neither_overflows_nor_loses_sign() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 1e4, -1e4], dtype=torch.float64)
    expected = [0.0, 0.4337808304830271, 0.4337808304830271, 9999.306852819440, 9999.306852819440]
    torch.testing.assert_close(reference.log_cosh(x), torch.tensor(expected, dtype=torch.float64))


def test_sparse_advantages_stand_at_the_sampled_action() -> None:
    dense = reference.sparse_advantages(torch.tensor([2, 0]), torch.tensor([1.5, -1.0]), 4)
    assert dense.tolist() == [[0.0, 0.0, 1.5, 0.0], [-1.0, 0.0, 0.0, 0.0]]


@settings(max_examples=5)
@given(st.sampled_from(["median", "policy"]))
def test_an_unknown_weighting_or_one_without_its_policy_is_refused(weighting: str) -> None:
    with pytest.raises(ValueError, match="weighting"):
        reference.mse(torch.zeros(4), torch.zeros(4), weighting)
