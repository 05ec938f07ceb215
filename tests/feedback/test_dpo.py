"""The dense advantage of the sampled tokens against the full vocabulary in float64."""

import torch

from lco_lite.feedback.advantages import dpo_shift, sampled_advantages
from lco_lite.objectives.head import Head


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


def test_the_difference_is_formed_before_it_is_rounded():
    h_ref = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    h_dpo = torch.full((1, 1), 258.0, dtype=torch.bfloat16)
    assert dpo_shift(h_dpo, h_ref).item() == 2.0
    assert dpo_shift(h_dpo, h_ref).dtype == torch.bfloat16
