"""Hessians, bounds and rates in the logits, against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lco_lite.study.base import Results
from lco_lite.study.convexity import CONVEX, PPO, Convexity, bounds, descent, gradient, hessians, look, losses

V = 7


def logits(seed: int, n: int = 3, scale: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    z, target, old = (scale * torch.randn(n, V, generator=generator, dtype=torch.float64) for _ in range(3))
    return z, target, old, torch.randint(V, (n,), generator=generator)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_hessians_are_those_of_autograd(seed):
    z, target, old, action = logits(seed)
    found = hessians(z, target, old, action)
    for i in range(len(z)):
        functions = losses(target[i : i + 1], action[i : i + 1])
        before = old[i].log_softmax(-1)[action[i]]
        for sign, name in zip((1.0, -1.0), PPO, strict=True):
            functions[name] = lambda x, i=i, before=before, sign=sign: (
                -sign * (x[0].log_softmax(-1)[action[i]] - before).exp()
            )
        for name, loss in functions.items():
            by_autograd = torch.autograd.functional.hessian(lambda x, f=loss: f(x.unsqueeze(0)).sum(), z[i])
            torch.testing.assert_close(found[name][i], by_autograd, atol=1e-10, rtol=1e-8)


@given(st.integers(0, 10_000), st.floats(0.01, 8.0))
@settings(max_examples=50, deadline=None)
def test_gradients_keep_to_their_bounds_and_descent_to_its_rate(seed, scale):
    z, target, _, action = logits(seed, scale=scale)
    limits = bounds(z, target)
    for name, loss in losses(target, action).items():
        assert (gradient(loss, z).norm(dim=-1) <= limits[name] * (1 + 1e-9)).all()
        if name != "sft":
            reached, rate = descent(name, loss, z, target, 20)
            assert (reached <= rate + 1e-9).all()


def test_mse_is_at_its_optimum_after_one_step_of_its_own_size():
    z, target, _, action = logits(0)
    reached, rate = descent("mse", losses(target, action)["mse"], z, target, 1)
    assert reached.max() < 1e-25 and rate.max() == 0


def test_lco_is_convex():
    told = look(*logits(1, n=20))["losses"]
    assert all(told[name]["lowest"] > -1e-12 and told[name]["negative"] == 0 for name in CONVEX)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_ppo_is_convex_or_concave_by_the_sign_of_a_where_the_token_has_half_of_the_probability_and_else_neither(seed):
    z, target, old, action = logits(seed, n=8)
    likely = z.softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1) > 0.5
    found = hessians(z, target, old, action)
    up, down = (torch.linalg.eigvalsh(found[name]) for name in PPO)
    size = up.abs().amax(-1)
    assert torch.equal(up[:, 0] < -1e-9 * size, ~likely) and (up[:, -1] > 0).all()
    assert torch.equal(down[:, -1] > 1e-9 * size, ~likely) and (down[:, 0] < 0).all()


@pytest.mark.parametrize("name", CONVEX)
def test_one_negative_eigenvalue_refutes_a_claim(name):
    rows = [{"label": "convexity", "seed": s, "points": [{"update": 0} | look(*logits(1, n=20))]} for s in (1, 2, 3)]
    row = rows[0]

    def verdicts(rows):
        return {claim.name: claim.verdict for claim in Convexity().report(Results(rows)).claims}

    verdict = verdicts(rows)
    assert {verdict[claim] for claim in verdict if "ppo" not in claim} == {"reproduced"}
    assert set(verdicts(rows[:2]).values()) == {"unclear"}
    row["points"][0]["losses"][name] |= {"lowest": -1e-3, "tight": 1.1, "excess": 1e-3}
    verdict = verdicts(rows)
    assert verdict[f"C5, {name}"] == verdict[f"bound, {name}"] == "not reproduced"
    assert name == "sft" or verdict[f"rate, {name}"] == "not reproduced"
    assert math.isfinite(row["points"][0]["losses"][name]["least"])
