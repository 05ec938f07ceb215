"""The public code's few-token objectives against the same formulas on whole logits, in float64."""

import pytest
import torch
from objective_cases import make_case

from lco_lite.objectives import reference
from lco_lite.objectives.authors_code import dense_top_k, sampled_token, top_k_loss
from lco_lite.objectives.head import Head

K = 4


def problem(softcap=None):
    case = make_case(5, tokens=7, vocabulary=12, softcap=softcap)
    shift = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = Head(torch.randn(12, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return case, shift, own, case.head.logits(case.target.old), shift @ own.weight.T


def standardised(objective, advantages):
    if objective == "kld":
        return advantages / advantages.std(-1, keepdim=True)
    return (advantages - advantages.mean(-1, keepdim=True)) / advantages.std(-1, keepdim=True)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("objective", ["kld", "mse", "lch"])
def test_dense_values_and_gradients_equal_the_formulas_on_whole_logits(objective, current, softcap):
    case, shift, own, z_old, a = problem(softcap)
    target = dense_top_k(objective, case.target.old, case.head, shift, own, 0.5, K)
    loss, found = top_k_loss(objective, case.hidden, case.head, target, current)
    z = case.head.logits(case.hidden)
    top = z_old.topk(K).indices
    step = standardised(objective, a.gather(-1, top)) / 0.5
    if objective == "kld":
        few = torch.full_like(z, -torch.inf).scatter(-1, top, z_old.gather(-1, top) + step).softmax(-1)
        each = (few.clamp_min(1e-300) * (few.clamp_min(1e-300).log() - z.log_softmax(-1))).sum(-1)
    else:
        base = z.detach() if current else z_old
        r = base.gather(-1, top) + step - z.gather(-1, top)
        each = (r.square() if objective == "mse" else reference.log_cosh(r)).sum(-1)
    torch.testing.assert_close(loss, each.mean())
    torch.testing.assert_close(found["loss"], each.detach())
    (ours,), (theirs,) = torch.autograd.grad(loss, case.hidden), torch.autograd.grad(each.mean(), case.hidden)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("objective", ["mse", "lch"])
def test_the_sampled_token_alone_is_pulled_to_its_advantage(objective):
    case, _, _, z_old, _ = problem()
    advantages = torch.linspace(-1, 1, 7, dtype=torch.float64)
    loss, _ = top_k_loss(
        objective, case.hidden, case.head, sampled_token(case.target.old, case.head, case.actions, advantages, 2.0)
    )
    index = case.actions.unsqueeze(-1)
    r = (z_old.gather(-1, index) + advantages.unsqueeze(-1) / 2 - case.logits().gather(-1, index)).squeeze(-1)
    torch.testing.assert_close(loss, (r.square() if objective == "mse" else reference.log_cosh(r)).mean())


@pytest.mark.parametrize("objective", ["mse", "lch"])
def test_with_the_current_logits_the_loss_never_falls(objective):
    """Why the paper's target is z_old: a target that moves along is never reached."""
    case, shift, own, _, _ = problem()
    target = dense_top_k(objective, case.target.old, case.head, shift, own, 1.0, K)
    before, _ = top_k_loss(objective, case.hidden, case.head, target, current=True)
    after, _ = top_k_loss(objective, case.hidden + 1, case.head, target, current=True)
    torch.testing.assert_close(before, after)
