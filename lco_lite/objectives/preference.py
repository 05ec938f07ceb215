"""DPO (Rafailov et al. 2023, eq 7): the reward is implicit, r = β log φ(y|x)/φ_ref(y|x)."""

from torch import Tensor
from torch.nn import functional as F

ChosenRejected = tuple[Tensor, Tensor]  # log-probabilities of whole responses, each [N]


def dpo_loss(logprobs: ChosenRejected, reference: ChosenRejected, beta: float) -> tuple[Tensor, Tensor]:
    """Of N pairs under φ and φ_ref -> (loss [N], margin [N]): -log σ(margin), margin = r(chosen) - r(rejected)."""
    chosen, rejected = (ours - ref for ours, ref in zip(logprobs, reference, strict=True))
    margin = beta * (chosen - rejected)
    return -F.logsigmoid(margin), margin.detach()
