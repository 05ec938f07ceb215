"""Rule feedback: +1 for a right response, -1 for a wrong one (paper, eq 11). The task grades."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rule_rewards(right: Sequence[bool]) -> Tensor:
    """[N] of +1 and -1."""
    return torch.tensor([1.0 if r else -1.0 for r in right])
