"""DPO's loss against its formula."""

import math

import torch

from lco_lite.objectives.logprobs import dpo_loss


def test_the_loss_is_minus_log_sigmoid_of_the_margin():
    loss, margin = dpo_loss(
        (torch.tensor([-3.0]), torch.tensor([-5.0])), (torch.tensor([-4.0]), torch.tensor([-4.5])), beta=0.1
    )
    assert math.isclose(margin.item(), 0.1 * ((-3 + 4) - (-5 + 4.5)), rel_tol=1e-6)
    assert math.isclose(loss.item(), -math.log(1 / (1 + math.exp(-margin.item()))), rel_tol=1e-6)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_alike():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo_loss((chosen, rejected), (torch.zeros(1), torch.zeros(1)), beta=0.1)[0].sum().backward()
    assert math.isclose(chosen.grad.item(), -0.05, rel_tol=1e-6)
    assert math.isclose(rejected.grad.item(), 0.05, rel_tol=1e-6)
