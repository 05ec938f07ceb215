"""DPO feedback: the dense advantage A(a) = log φ_DPO(a) - log φ_ref(a) (paper, eq 13), in hidden space.

Through a frozen linear head A is W·(h_dpo - h_ref) up to a constant a token, and centring removes the constant: the
difference of two hidden states is the whole advantage over the vocabulary (docs/hidden-space.md).
"""

import torch
from torch import Tensor

from lco_lite.objectives.head import Head


def dpo_shift(h_dpo: Tensor, h_ref: Tensor) -> Tensor:
    """[T, d_r], [T, d_r] -> [T, d_r]: the difference, formed in at least fp32 and rounded once to the inputs' type."""
    precise = torch.promote_types(h_dpo.dtype, torch.float32)
    return (h_dpo.to(precise) - h_ref.to(precise)).to(h_dpo.dtype)


def sampled_advantages(shift: Tensor, head: Head, actions: Tensor) -> Tensor:
    """A(a_t), centred over the vocabulary, of the sampled ``actions`` [T] -> [T]: (W_a - w̄)·shift. For the metrics."""
    rows = head.vocabulary[actions.to(head.weight.device)].to(shift.dtype)
    return head.scale * ((rows - head.mean_row.to(shift.dtype)) * shift).sum(-1)
