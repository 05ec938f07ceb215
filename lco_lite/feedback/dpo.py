"""DPO feedback: the dense advantage A(a) = log φ_DPO(a) - log φ_ref(a) (paper, eq 13), in hidden space.

Through a frozen linear head A is W·(h_dpo - h_ref) up to a constant a token, and centring removes the constant: the
difference of two hidden states is the whole advantage over the vocabulary (docs/hidden-space.md).
"""

import torch
from torch import Tensor

from lco_lite.objectives.chunks import spans
from lco_lite.objectives.head import Head, wide


def dpo_shift(h_dpo: Tensor, h_ref: Tensor) -> Tensor:
    """[T, d_r], [T, d_r] -> [T, d_r]: the difference, formed in at least fp32 and rounded once to the inputs' type."""
    precise = torch.promote_types(h_dpo.dtype, torch.float32)
    return (h_dpo.to(precise) - h_ref.to(precise)).to(h_dpo.dtype)


def sampled_advantages(shift: Tensor, head: Head, actions: Tensor, base: Tensor | None = None) -> Tensor:
    """A(a_t), centred over the vocabulary, of the sampled ``actions`` [T] -> [T]: (W_a - w̄)·shift. For the metrics.

    Through a soft-capped head it is a difference of logits, which ``base`` [T, d_r], h_ref, is needed for."""
    if head.softcap is not None and base is not None:
        return _capped(shift, head, actions.to(shift.device), base.to(wide(shift, head.weight)))
    rows = head.vocabulary[actions.to(head.weight.device)].to(shift.dtype)
    return head.scale * ((rows - head.mean_row.to(shift.dtype)) * shift).sum(-1)


def _capped(shift: Tensor, head: Head, actions: Tensor, base: Tensor) -> Tensor:
    found = []
    for part in spans(len(shift), None, head.rows, shift.device):
        a = head.logits(base[part] + shift[part]) - head.logits(base[part])
        found.append(a.gather(-1, actions[part].unsqueeze(-1)).squeeze(-1) - a.mean(-1))
    return torch.cat(found)
