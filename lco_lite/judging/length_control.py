"""The win rate that remains when a model's answers are as long as the reference's (Dubois et al. 2024, AlpacaEval 2).

A logistic model of the score s of each pair, fitted by its log-likelihood with s as a probability:

    s_i ~ sigmoid(theta + phi * tanh(d_i / std(d)) + psi * difficulty_i),  d_i = length of the answer - of the reference

and the length-controlled win rate is the mean of sigmoid(theta + psi * difficulty_i): the length term is set to 0.
phi and psi have a standard normal prior (a ridge of 1), theta one so wide that it only keeps it finite where every
score is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1.0  # of phi and psi
RIDGE_OF_CONSTANT = 1e-6
_STEPS, _ENOUGH = 100, 1e-10


def length_controlled(
    scores: Sequence[float], differences: Sequence[float], difficulty: Sequence[float] | None = None
) -> float:
    """Win rate in [0, 1]. ``scores`` in [0, 1]; ``differences`` in characters; ``difficulty`` where it is known."""
    import torch

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor([float(v) for v in values], dtype=torch.float64)

    s, d = column(scores), column(differences)
    spread = float(d.std()) if len(d) > 1 else 0.0
    length = torch.tanh(d / spread) if spread > 0 else torch.zeros_like(d)
    x = torch.stack([torch.ones_like(s), length, *([] if difficulty is None else [column(difficulty)])], dim=1)
    weights = _fit(x, s)
    even = x.clone()
    even[:, 1] = 0.0
    return float(torch.sigmoid(even @ weights).mean())


def _fit(x: Tensor, s: Tensor) -> Tensor:
    """[N, K], [N] -> [K]: the weights of highest posterior, by Newton's method."""
    import torch

    ridge = torch.full((x.shape[1],), RIDGE, dtype=x.dtype)
    ridge[0] = RIDGE_OF_CONSTANT

    def cost(w: Tensor) -> float:
        z = x @ w
        return float(torch.nn.functional.softplus(z).sum() - s @ z + (ridge * w * w).sum() / 2)

    w = torch.zeros_like(ridge)
    for _ in range(_STEPS):
        p = torch.sigmoid(x @ w)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + torch.diag(ridge)
        step = torch.linalg.solve(curvature, x.T @ (p - s) + ridge * w)
        scale = 1.0
        while cost(w - scale * step) > cost(w) and scale > _ENOUGH:
            scale /= 2  # a whole step may overshoot where the scores are all alike
        w = w - scale * step
        if float((scale * step).abs().max()) < _ENOUGH:
            break
    return w
