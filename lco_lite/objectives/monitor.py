"""What every objective shows of the policy, by the same means: entropy, KL to π_old, probability of the sampled tokens.

Measured on a fixed number of tokens, whose logits are the only ones formed.
"""

import torch
from torch import Tensor

from lco_lite.objectives.head import Head

MONITORED_TOKENS = 256  # 256 x 151,936 logits in fp32 are 148 MiB, twice


@torch.no_grad()
def monitor(
    hidden: Tensor, old: Tensor, head: Head, actions: Tensor, old_head: Head | None = None
) -> dict[str, Tensor]:
    """Means over ``MONITORED_TOKENS`` of the T tokens, evenly spread: ``entropy`` of π_θ and ``kl_to_old`` =
    KL(π_θ ‖ π_old) in nats, ``sampled_prob`` = π_θ(a). ``hidden``, ``old`` [T, d]; ``actions`` [T]."""
    spread = torch.linspace(0, len(actions) - 1, min(len(actions), MONITORED_TOKENS), device=hidden.device).long()
    hidden, old, actions = hidden[spread], old[spread], actions[spread]
    logp = head.logits(hidden).log_softmax(-1)
    old_logp = (old_head or head).logits(old).log_softmax(-1)
    p = logp.exp()
    return {
        "entropy": -(p * logp).sum(-1).mean(),
        "kl_to_old": (p * (logp - old_logp)).sum(-1).mean(),
        "sampled_prob": p.gather(-1, actions.unsqueeze(-1)).mean(),
    }
