"""Each policy gradient against a plain restatement of its paper, in float64, and split into micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, Correction, PolicyBatch, ValueHead, value_loss
from lco_lite.objectives.reference import importance

LENGTHS = [3, 1, 4]
ROWS = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
CLIP = Clip(0.2, 0.28)


def case(seed=0, on_policy=False, spread=True):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(len(ROWS), generator=generator, dtype=torch.float64)
    shift = 0 if on_policy else 0.6 * torch.randn(len(ROWS), generator=generator, dtype=torch.float64)
    new = (old + shift).requires_grad_()
    per_sequence = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    advantages = per_sequence[ROWS] if spread else torch.randn(len(ROWS), generator=generator, dtype=torch.float64)
    return new, old, advantages


def clipped(ratio, a, low=CLIP.low, high=CLIP.high):
    return min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)


def restated(name, new, old, advantages):
    """The papers' formulas, token by token."""
    tokens = list(zip(new.tolist(), old.tolist(), advantages.tolist(), ROWS.tolist(), strict=True))
    sequences = [[t for t in tokens if t[3] == i] for i in range(len(LENGTHS))]
    if name == "reinforce":
        return -sum(n * a for n, _, a, _ in tokens) / len(tokens)
    if name in ("ppo", "dapo"):
        return -sum(clipped(math.exp(n - o), a) for n, o, a, _ in tokens) / len(tokens)
    if name == "grpo":
        return -sum(sum(clipped(math.exp(n - o), a) for n, o, a, _ in s) / len(s) for s in sequences) / len(sequences)
    ratios = [math.exp(sum(n - o for n, o, _, _ in s) / (len(s) if name == "gspo" else 1)) for s in sequences]
    return -sum(clipped(r, s[0][2]) for r, s in zip(ratios, sequences, strict=True)) / len(sequences)


def loss(name, new, old, advantages):
    return POLICY_GRADIENTS[name](PolicyBatch(new, old, advantages, ROWS, len(ROWS), len(LENGTHS)), CLIP)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
@pytest.mark.parametrize("seed", range(5))
def test_each_loss_is_the_papers_formula(name, seed):
    new, old, advantages = case(seed)
    assert loss(name, new, old, advantages)[0].item() == pytest.approx(restated(name, new, old, advantages), rel=1e-12)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_gradients_agree_with_finite_differences(name):
    new, old, advantages = case(3)
    assert torch.autograd.gradcheck(lambda x: loss(name, x, old, advantages)[0], new, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_a_weight_multiplies_the_loss_of_what_the_ratio_is_of(name, kind):
    """A token's for most; the product of a response's for rloo, its geometric mean for gspo. Values and gradients: a
    weight is a constant, so that the loss is one of weighted advantages."""
    new, old, advantages = case(4)
    sampler = old - torch.linspace(-0.5, 0.6, len(ROWS), dtype=torch.float64)
    held = Correction(kind, 1.2, 0.8, 1.4)
    low, high = (0.0, 1.2) if kind == "truncate" else (0.8, 1.4)
    weight = importance(old, sampler, kind, low, high)
    if name in ("rloo", "gspo"):
        for i, n in enumerate(LENGTHS):
            share = 1 / n if name == "gspo" else 1.0
            mine = (i == ROWS).nonzero().flatten()
            weight[mine] = importance(share * old[mine].sum(), share * sampler[mine].sum(), kind, low, high)
    assert len(set(weight.tolist())) > 1
    batch = PolicyBatch(new, old, advantages, ROWS, len(ROWS), len(LENGTHS), log_w=old - sampler, correction=held)
    got, want = POLICY_GRADIENTS[name](batch, CLIP)[0], loss(name, new, old, advantages * weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x, new)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)
    same = replace(batch, log_w=torch.zeros_like(old))
    assert torch.equal(POLICY_GRADIENTS[name](same, CLIP)[0], loss(name, new, old, advantages)[0])


@pytest.mark.parametrize("name", ["ppo", "dapo"])
def test_with_one_update_a_rollout_the_gradient_is_that_of_reinforce(name):
    new, old, advantages = case(on_policy=True, spread=False)
    (ours,) = torch.autograd.grad(loss(name, new, old, advantages)[0], new)
    (plain,) = torch.autograd.grad(loss("reinforce", new, old, advantages)[0], new)
    torch.testing.assert_close(ours, plain)


def test_the_clip_takes_the_gradient_away_only_where_the_ratio_has_gone_too_far_already():
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    batch = PolicyBatch(
        new, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.long), 4, 1
    )
    value, found = POLICY_GRADIENTS["ppo"](batch, Clip(0.2, 0.2))
    value.backward()
    assert found["clipped"].tolist() == [1, 0, 0, 1]
    assert (new.grad == 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
@given(seed=st.integers(0, 50), cut=st.integers(1, 2))
@settings(max_examples=15, deadline=None)
def test_micro_batches_add_up_to_the_minibatch(name, seed, cut):
    new, old, advantages = case(seed)
    whole = loss(name, new, old, advantages)[0]
    parts = 0
    for mask in (cut > ROWS, cut <= ROWS):
        rows = ROWS[mask] - ROWS[mask].min()
        batch = PolicyBatch(new[mask], old[mask], advantages[mask], rows, len(ROWS), len(LENGTHS))
        parts = parts + POLICY_GRADIENTS[name](batch, CLIP)[0]
    torch.testing.assert_close(parts, whole)


def test_the_critic_starts_at_zero_and_trains_no_hidden_state():
    hidden = torch.randn(5, 8, requires_grad=True)
    head = ValueHead(8)
    values = head(hidden)
    assert values.tolist() == [0] * 5
    value_loss(values, torch.zeros(5), torch.ones(5), 0.2, 5).backward()
    assert hidden.grad is None and head.linear.bias.grad.item() == pytest.approx(-1.0)


def test_the_value_loss_takes_the_worse_of_free_and_clipped():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.ones(2)
    expected = 0.5 * (max((1 - 1) ** 2, (0.2 - 1) ** 2) + (0.1 - 1) ** 2) / 2
    assert value_loss(values, old, returns, 0.2, 2).item() == pytest.approx(expected)
