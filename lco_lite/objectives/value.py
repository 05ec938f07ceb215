"""PPO's critic: a linear value head on the policy's final hidden states, and its clipped loss (TRL 1.10)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(s_t) = w·h_t + b, zero at the start: every advantage is then its return. It does not train hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, d] -> [T], in fp32."""
        return self.linear(hidden.detach().to(self.linear.weight.dtype)).squeeze(-1)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float, tokens: int) -> Tensor:
    """½ max((V - R)², (V_clipped - R)²), summed over the micro-batch's T tokens and divided by the minibatch's."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square()).sum() / tokens
