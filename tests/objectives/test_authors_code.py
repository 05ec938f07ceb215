"""The public code's choices, through the two hooks, against the same formulas on whole logits, in float64."""

from types import SimpleNamespace

import pytest
import torch
from objective_cases import Case, make_case

from lco_lite.objectives import reference
from lco_lite.objectives.authors_code import TopKTarget, loss_hook, target_hook
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.policy_gradient import PolicyBatch
from lco_lite.objectives.targets import DenseTarget, SparseTarget
from lco_lite.recipe import Rl

K, BETA = 4, 0.5


def recipe(objective, weighting="mean", standardise=False, **variant):
    off = {"top_k": None, "target": "old", "negative_beta": None, "agreement": None}
    values = SimpleNamespace(**off | variant)
    return SimpleNamespace(objective=objective, weighting=weighting, standardise=standardise, variant=values)


def batch_of(case: Case) -> PolicyBatch:
    n = len(case.actions)
    return PolicyBatch(
        None, torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.long), n, 1, actions=case.actions
    )


def dense(softcap=None):
    """(case, its dense target with a wider reward model of its own head, z_old, A)."""
    case = make_case(5, tokens=7, vocabulary=12, softcap=softcap)
    shift = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = Head(torch.randn(12, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    target = DenseTarget(case.target.old, BETA, shift, own)
    return case, target, case.head.logits(case.target.old), shift @ own.weight.T


def plugged(rl, case, target, hidden=None):
    """(loss, diagnostics) of both hooks, the target moved as a trainer does."""
    batch = batch_of(case)
    changed = target_hook(rl)(target, case.head, batch).to("cpu")
    assert len(changed) == len(case.hidden)
    return loss_hook(rl)(case.hidden if hidden is None else hidden, case.head, changed, batch)


def standardised(objective, advantages):
    if objective == "kld":
        return advantages / advantages.std(-1, keepdim=True)
    return (advantages - advantages.mean(-1, keepdim=True)) / advantages.std(-1, keepdim=True)


def restated(objective, z, z_old, a, current):
    """The loss of each token over the likeliest K, on whole logits ``z``."""
    top = z_old.topk(K).indices
    step = standardised(objective, a.gather(-1, top)) / BETA
    if objective == "kld":
        few = torch.full_like(z, -torch.inf).scatter(-1, top, z_old.gather(-1, top) + step).softmax(-1)
        return (few.clamp_min(1e-300) * (few.clamp_min(1e-300).log() - z.log_softmax(-1))).sum(-1)
    base = z.detach() if current else z_old
    r = base.gather(-1, top) + step - z.gather(-1, top)
    return (r.square() if objective == "mse" else reference.log_cosh(r)).sum(-1)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("objective", ["kld", "mse", "lch"])
def test_dense_values_gradients_and_diagnostics_equal_the_formulas_on_whole_logits(objective, current, softcap):
    case, target, z_old, a = dense(softcap)
    rl = recipe(objective, top_k=K, target="current" if current else "old")
    loss, seen = plugged(rl, case, target)
    z = case.head.logits(case.hidden)
    each = restated(objective, z, z_old, a, current)
    torch.testing.assert_close(loss, each.mean())
    (ours,), (theirs, grad) = torch.autograd.grad(loss, case.hidden), torch.autograd.grad(each.mean(), [case.hidden, z])
    torch.testing.assert_close(ours, theirs)
    log_p, index = z.detach().log_softmax(-1), case.actions.unsqueeze(-1)
    want = {
        "loss": each.detach(),
        "logit_grad_norm": 7 * grad.norm(dim=-1),
        "logit_grad_sampled": 7 * grad.gather(-1, index).squeeze(-1).abs(),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logprob": log_p.gather(-1, index).squeeze(-1),
    }
    assert set(seen) == set(want) and not any(x.requires_grad for x in seen.values())
    assert objective == "kld" or 0 < (want["logit_grad_sampled"] == 0).sum() < 7, "some actions are among the K"
    for name, value in want.items():
        torch.testing.assert_close(seen[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("objective", ["kld", "mse", "lch"])
def test_through_a_soft_capped_reward_model_the_few_advantages_are_differences_of_capped_logits(objective, scale):
    case, target, z_old, _ = dense()
    weight, bias, base = 3 * target.shift_head.weight, torch.linspace(-1, 1, 12, dtype=torch.float64), target.shift / 3
    capped = Head(weight, bias, scale, softcap=2.0)
    target = DenseTarget(case.target.old, BETA, target.shift, capped, base)
    a = capped.logits(base + target.shift) - capped.logits(base)
    loss, _ = plugged(recipe(objective, top_k=K), case, target)
    want = restated(objective, case.head.logits(case.hidden), z_old, a, False).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, case.hidden)[0] for x in (loss, want)))


@pytest.mark.parametrize("negative_beta", [None, 100.0])
@pytest.mark.parametrize("objective", ["mse", "lch"])
def test_the_sampled_token_alone_is_pulled_to_its_advantage(objective, negative_beta):
    case, _, z_old, _ = dense()
    advantages = torch.linspace(-1, 1, 7, dtype=torch.float64)
    target = SparseTarget(case.target.old, 2.0, case.actions, advantages)
    loss, seen = plugged(recipe(objective, top_k=1, negative_beta=negative_beta), case, target)
    index = case.actions.unsqueeze(-1)
    scaled = torch.where(advantages > 0, advantages, advantages / (negative_beta or 1))
    r = (z_old.gather(-1, index) + scaled.unsqueeze(-1) / 2 - case.logits().gather(-1, index)).squeeze(-1).detach()
    torch.testing.assert_close(loss, (r.square() if objective == "mse" else reference.log_cosh(r)).mean())
    torch.testing.assert_close(seen["logit_grad_sampled"], (2 * r if objective == "mse" else r.tanh()).abs())


@pytest.mark.parametrize("objective", ["mse", "lch"])
def test_with_the_current_logits_the_loss_never_falls(objective):
    """Why the paper's target is z_old: a target that moves along is never reached."""
    case, target, _, _ = dense()
    rl = recipe(objective, top_k=K, target="current")
    before, _ = plugged(rl, case, target)
    after, _ = plugged(rl, case, target, case.hidden + 1)
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("weighting", ["mean", "policy"])
@pytest.mark.parametrize("objective", ["mse", "lch"])
def test_the_current_target_over_the_whole_vocabulary_starts_from_the_policy_of_each_update(objective, weighting):
    case, target, _, a = dense()
    loss, _ = plugged(recipe(objective, weighting, target="current"), case, target)
    z = case.head.logits(case.hidden)
    goal = reference.optimal_logits(z.detach(), a, BETA)
    formula = {"mse": reference.mse, "lch": reference.lch}[objective]
    want = formula(z, goal, weighting, z.detach()).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, case.hidden)[0] for x in (loss, want)))


def test_where_both_find_the_sampled_token_likely_its_step_is_a_hundredth():
    case, target, z_old, a = dense()
    both = torch.minimum(*(z.log_softmax(-1).gather(-1, case.actions.unsqueeze(-1)) for z in (z_old, a))).squeeze(-1)
    threshold = both.median().item()
    loss, seen = plugged(recipe("kld", agreement=threshold), case, target)
    agreed = both > threshold
    assert 0 < agreed.sum() < 7
    goal = reference.optimal_logits(z_old, torch.where(agreed.unsqueeze(-1), a / 100, a), BETA)
    torch.testing.assert_close(seen["loss"], reference.kld(case.logits(), goal).detach())
    torch.testing.assert_close(loss, seen["loss"].mean())


@pytest.mark.parametrize("objective", ["kld", "mse", "lch"])
def test_negative_advantages_alone_are_divided(objective):
    case = make_case(3, kind="sparse", tokens=7)
    a = case.target.advantages
    assert 0 < (a > 0).sum() < 7
    divided = SparseTarget(case.target.old, case.target.beta, case.actions, torch.where(a > 0, a, a / 100))
    loss, _ = plugged(recipe(objective, negative_beta=100.0), case, case.target)
    torch.testing.assert_close(loss, lco_loss(objective, case.hidden, case.head, divided)[0], rtol=0, atol=0)


def test_with_every_variant_off_the_hooks_are_the_papers_own_path():
    """With the recipe's own section: the fields that the hooks read are there, and their defaults change nothing."""
    case, target, _, _ = dense()
    rl, batch = Rl(), batch_of(case)
    assert target_hook(rl)(target, case.head, batch) is target
    ours, seen = loss_hook(rl)(case.hidden, case.head, target, batch)
    plain, values = lco_loss(rl.objective, case.hidden, case.head, target, actions=case.actions)
    assert torch.equal(ours, plain) and set(seen) == set(values)


def test_the_recipes_section_turns_the_target_into_that_of_few_tokens():
    case, target, z_old, _ = dense()
    few = target_hook(Rl(variant={"top_k": 3}))(target, case.head, batch_of(case))
    assert isinstance(few, TopKTarget) and torch.equal(few.indices, z_old.topk(3).indices)
