"""DPO (Rafailov et al. 2023, eq 7): the reward is implicit, r = β log φ(y|x)/φ_ref(y|x)."""

from torch import Tensor
from torch.nn import functional as F


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Sequence log-probabilities [N] of each -> (loss [N], margin [N]): -log σ(margin), margin = r(chosen) - r(rejected)."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin.detach()
