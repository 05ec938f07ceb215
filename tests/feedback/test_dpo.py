"""The dense advantage of the sampled tokens against the full vocabulary in float64."""

import pytest
import torch

from lco_lite.feedback.advantages import dpo_shift, log_phi_shift, sampled_advantages
from lco_lite.objectives import reference
from lco_lite.objectives.authors_code import likeliest
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import OBJECTIVES, lco_loss
from lco_lite.objectives.targets import DenseTarget, MixedTarget


def test_the_sampled_advantage_is_the_centred_log_ratio_at_the_action():
    torch.manual_seed(0)
    head = Head(torch.randn(11, 5, dtype=torch.float64), scale=0.5)
    h_dpo, h_ref = torch.randn(2, 7, 5, dtype=torch.float64)
    actions = torch.randint(0, 11, (7,))
    advantages = head.logits(h_dpo).log_softmax(-1) - head.logits(h_ref).log_softmax(-1)
    advantages -= advantages.mean(-1, keepdim=True)
    expected = advantages.gather(-1, actions[:, None]).squeeze(-1)
    torch.testing.assert_close(sampled_advantages(dpo_shift(h_dpo, h_ref), head, actions), expected)


def test_through_a_soft_capped_head_it_is_the_difference_of_the_capped_logits():
    torch.manual_seed(0)
    head = Head(torch.randn(11, 5, dtype=torch.float64), softcap=2.0)
    h_dpo, h_ref = torch.randn(2, 7, 5, dtype=torch.float64)
    actions = torch.randint(0, 11, (7,))
    advantages = head.logits(h_dpo).log_softmax(-1) - head.logits(h_ref).log_softmax(-1)
    advantages -= advantages.mean(-1, keepdim=True)
    expected = advantages.gather(-1, actions[:, None]).squeeze(-1)
    found = sampled_advantages(dpo_shift(h_dpo, h_ref), head, actions, h_ref)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_log_phi_alone_has_the_bias_of_its_head_in_it_on_every_path(objective, bias, scale, softcap):
    """eq 12, where nothing cancels it: values and gradients of the dense, the mixed and the standardised target, and of
    the few likeliest tokens, and A of the sampled ones."""
    torch.manual_seed(0)
    weight, h, phi, old = (torch.randn(*n, dtype=torch.float64) for n in ((12, 5), (7, 4), (7, 5), (7, 4)))
    own = Head(weight, 3 * torch.randn(12, dtype=torch.float64) if bias else None, scale, softcap, rows=11)
    policy, actions, sparse = Head(torch.randn(11, 4, dtype=torch.float64)), torch.randint(0, 11, (7,)), torch.randn(7)
    hidden, index = h.requires_grad_(), actions[:, None]
    log_phi = own.logits(phi).log_softmax(-1)
    centred = log_phi - log_phi.mean(-1, keepdim=True)
    shift, head, base = log_phi_shift(phi, own)
    assert (shift is phi and head is own) or bias
    torch.testing.assert_close(sampled_advantages(shift, head, actions, base), centred.gather(-1, index).squeeze(-1))
    dense = DenseTarget(old, 2.0, shift, head, base)
    mixed = MixedTarget(old, 2.0, actions=actions, advantages=sparse, shift=shift, shift_head=head, shift_base=base)
    z_old, exact = policy.logits(old), getattr(reference, objective)
    for target, standardise, a in (
        (dense, False, log_phi),
        (dense, True, centred / centred.std(-1, correction=0, keepdim=True)),
        (mixed, False, log_phi + reference.sparse_advantages(actions, sparse, 11)),
    ):
        loss, _ = lco_loss(objective, hidden, policy, target, standardise=standardise)
        want = exact(policy.logits(hidden), reference.optimal_logits(z_old, a, 2.0)).mean()
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (loss, want)))
    few = likeliest(objective, dense, policy, 4)
    chosen = log_phi.gather(-1, few.indices)
    chosen = chosen - chosen.mean(-1, keepdim=True)
    step = few.step - few.step.mean(-1, keepdim=True)
    torch.testing.assert_close(step, chosen / chosen.std(-1, keepdim=True) / 2.0)


def test_the_difference_is_formed_before_it_is_rounded():
    h_ref = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    h_dpo = torch.full((1, 1), 258.0, dtype=torch.bfloat16)
    assert dpo_shift(h_dpo, h_ref).item() == 2.0
    assert dpo_shift(h_dpo, h_ref).dtype == torch.bfloat16
