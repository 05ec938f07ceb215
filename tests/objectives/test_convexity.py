"""What the paper proves of LCO, on random cases: convex in the logits, bounded gradients, linear rates; and PPO's lack.

Logits are a vector of V = 6 numbers, z* another, r = z* − z; p = softmax(z). The loss functions are the oracle's.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lco_lite.objectives import reference

V = 6
seeds = st.integers(0, 2**31)
LOSSES = {"mse": reference.mse, "lch": reference.lch, "kld": reference.kld}


def draw(seed: int, *shape: int, size: float = 1.5) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, logits)


def smallest_eigenvalue(matrix: Tensor) -> float:
    return torch.linalg.eigvalsh(matrix).min().item()


def ppo(advantage: float, old_logits: Tensor, action: int) -> Callable[[Tensor], Tensor]:
    """PPO's loss while it is not clipped: −A π(a)/π_old(a)."""
    log_old = torch.log_softmax(old_logits, -1)[action]
    return lambda logits: -advantage * (torch.log_softmax(logits, -1)[action] - log_old).exp()


@pytest.mark.parametrize("name", LOSSES)
@given(seeds)
def test_lco_is_convex_in_the_logits(name: str, seed: int) -> None:
    logits, target = draw(seed, 2, V)
    assert smallest_eigenvalue(hessian(lambda z: LOSSES[name](z, target), logits)) > -1e-12


@pytest.mark.parametrize("name", ["mse", "lch"])
@given(seeds)
def test_the_policy_weighting_keeps_the_convexity(name: str, seed: int) -> None:
    logits, target, old = draw(seed, 3, V)
    matrix = hessian(lambda z: LOSSES[name](z, target, "policy", old), logits)  # type: ignore[operator]
    assert smallest_eigenvalue(matrix) > -1e-12


@given(seeds)
def test_hessians_are_those_of_the_paper(seed: int) -> None:
    logits, target = draw(seed, 2, V)
    p, r = torch.softmax(logits, -1), target - logits
    softmax = torch.diag(p) - torch.outer(p, p)
    expected = {"mse": torch.eye(V).double() * 2 / V, "lch": torch.diag(torch.cosh(r) ** -2) / V, "kld": softmax}
    for name, loss in LOSSES.items():
        torch.testing.assert_close(hessian(lambda z: loss(z, target), logits), expected[name])  # noqa: B023
    sft = hessian(lambda z: -torch.log_softmax(z, -1)[0], logits)
    torch.testing.assert_close(sft, softmax)
    assert smallest_eigenvalue(sft) > -1e-12


@given(seeds, st.floats(0.1, 5.0))
def test_ppo_curves_down_along_an_explicit_direction_for_either_sign(seed: int, size: float) -> None:
    logits, old = draw(seed, 2, V)
    p = torch.softmax(logits, -1)
    others = torch.zeros(V, dtype=torch.float64)
    others[1], others[2] = 1 / p[1], -1 / p[2]  # leaves π(a) alone to first order, lowers it to second
    negative = hessian(ppo(-size, old, 0), logits)
    assert others @ negative @ others < 0
    assume(p[0] < 0.49)
    own = torch.eye(V, dtype=torch.float64)[0]  # π(a) is convex in its own logit below one half
    assert own @ hessian(ppo(size, old, 0), logits) @ own < 0


@given(seeds, st.floats(0.1, 5.0))
def test_ppo_pushes_harder_the_further_it_has_gone_on_a_bad_action_and_lco_does_not(seed: int, size: float) -> None:
    start = draw(seed, V, size=0.5)
    start[0] = start[1:].logsumexp(-1) + 1  # π(a) = 0.73: a step down raises π(a) (1 − π(a))
    target = reference.optimal_logits(start, reference.sparse_advantages(torch.tensor(0), torch.tensor(-size), V), 1.0)

    def norm(loss: Callable[[Tensor], Tensor], logits: Tensor) -> float:
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(loss(logits), logits)[0].norm().item()

    stepped = start - 0.3 * torch.eye(V, dtype=torch.float64)[0]
    loss = ppo(-size, start, 0)
    assert norm(loss, stepped) > norm(loss, start)
    for name in ("mse", "lch", "kld"):
        halfway = start + 0.5 * (target - start)
        assert norm(lambda z: LOSSES[name](z, target), halfway) < norm(lambda z: LOSSES[name](z, target), start)  # noqa: B023


@given(seeds, st.floats(0.1, 3.0))
def test_gradient_norms_are_bounded_by_the_loss_that_is_left(seed: int, spread: float) -> None:
    """Eqs 16 to 18, for parameters θ behind the logits with Jacobian J: the bound shrinks as the target is reached."""
    jacobian, target = draw(seed, V, 4), draw(seed + 1, V, size=spread)
    theta = draw(seed + 2, 4).requires_grad_()
    logits = jacobian @ theta
    size = torch.linalg.matrix_norm(jacobian, 2).item()
    bounds = {
        "mse": lambda loss: 2 * math.sqrt(loss / V),
        "lch": lambda loss: min(math.sqrt(2 * loss / V), 1 / math.sqrt(V)),  # tanh² x ≤ 2 log cosh x
        "kld": lambda loss: math.sqrt(2 * loss),  # Pinsker
    }
    for name, bound in bounds.items():
        loss = LOSSES[name](logits, target)
        (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
        assert grad.norm().item() <= size * bound(loss.item()) + 1e-12


def descend(loss: Callable[[Tensor], Tensor], theta: Tensor, rate: float, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        theta = theta.detach().requires_grad_()
        value = loss(theta)
        values.append(value.item())
        theta = theta - rate * torch.autograd.grad(value, theta)[0]
    return values


@given(seeds)
def test_mse_of_a_linear_model_converges_at_the_linear_rate(seed: int) -> None:
    """Eqs 19 and 20: with z = Jθ, gradient descent at rate 1/L shrinks the loss by 1 − μ/L or more at every step."""
    jacobian, best = draw(seed, V, 4), draw(seed + 1, 4)
    values = torch.linalg.svdvals(jacobian)
    mu, smooth = (2 / V * values[-1] ** 2).item(), (2 / V * values[0] ** 2).item()
    losses = descend(lambda theta: reference.mse(jacobian @ theta, jacobian @ best), draw(seed + 2, 4), 1 / smooth, 30)
    for before, after in zip(losses, losses[1:], strict=False):
        assert after <= (1 - mu / smooth) * before + 1e-14


@given(seeds)
def test_lch_of_a_linear_model_converges_at_the_linear_rate_of_its_region(seed: int) -> None:
    """The same with the curvature sech²(R)/V, where R bounds the residuals: descent never leaves the region."""
    best, start = draw(seed, V, size=0.7), draw(seed + 1, V, size=0.7)
    region = (best - start).abs().max()
    mu, smooth = (1 / V / torch.cosh(region) ** 2).item(), 1 / V
    losses = descend(lambda z: reference.lch(z, best), start, 1 / smooth, 30)
    for before, after in zip(losses, losses[1:], strict=False):
        assert after <= (1 - mu / smooth) * before + 1e-14


@given(seeds)
def test_kld_of_a_linear_model_converges_at_a_linear_rate(seed: int) -> None:
    """The same where p is bounded below along the way, by its least entry, and so the curvature across constants."""
    best, start = draw(seed, V, size=0.7), draw(seed + 1, V, size=0.7)
    best, start = best - best.mean(), start - start.mean()
    distance = (best - start).norm()
    least = torch.softmax(best, -1).min() * torch.exp(-2 * distance)  # descent never moves away from z*
    rate = 1.0  # the curvature is below 1
    losses = descend(lambda z: reference.kld(z, best), start, rate, 40)
    for before, after in zip(losses, losses[1:], strict=False):
        assert after <= (1 - least.item()) * before + 1e-14
    assert losses[-1] < 0.5 * losses[0]
