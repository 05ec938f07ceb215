"""The win rate that remains when a model's answers are as long as the reference's (Dubois et al. 2024, AlpacaEval 2).

A logistic model of the score s of each pair, fitted by its log-likelihood with s as a probability:

    s_i ~ sigmoid(theta + phi * tanh(d_i / std(d)) + psi * difficulty_i),  d_i = length of the answer - of the reference

and the length-controlled win rate is the mean of sigmoid(theta + psi * difficulty_i): the length term is set to 0.
phi and psi have a standard normal prior (a ridge of 1), theta one so wide that it only keeps it finite where every
score is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

RIDGE = 1.0  # of phi and psi
RIDGE_OF_CONSTANT = 1e-6
_STEPS, _ENOUGH = 100, 1e-10


def length_controlled(
    scores: Sequence[float], differences: Sequence[float], difficulty: Sequence[float] | None = None
) -> float:
    """Win rate in [0, 1]. ``scores`` in [0, 1]; ``differences`` in characters; ``difficulty`` where it is known."""
    import numpy as np

    s, d = np.asarray(scores, float), np.asarray(differences, float)
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    length = np.tanh(d / spread) if spread > 0 else np.zeros_like(d)
    columns = [np.ones_like(s), length, *([] if difficulty is None else [np.asarray(difficulty, float)])]
    x = np.stack(columns, axis=1)
    ridge = np.diag([RIDGE_OF_CONSTANT] + [RIDGE] * (len(columns) - 1))

    def cost(w: np.ndarray) -> float:
        z = x @ w
        return float(np.logaddexp(0, z).sum() - s @ z + w @ ridge @ w / 2)

    weights = np.zeros(len(columns))
    for _ in range(_STEPS):
        p = _sigmoid(x @ weights)
        gradient = x.T @ (p - s) + ridge @ weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
        scale = 1.0
        while cost(weights - scale * step) > cost(weights) and scale > _ENOUGH:
            scale /= 2  # Newton's step may overshoot where the scores are all alike
        weights = weights - scale * step
        if np.abs(scale * step).max() < _ENOUGH:
            break
    even = x.copy()
    even[:, 1] = 0.0
    return float(_sigmoid(even @ weights).mean())


def _sigmoid(z):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.exp(-np.logaddexp(0, -z))
