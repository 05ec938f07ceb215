"""Is the loss convex in the logits, and what follows? Hessians along a run, bounds on gradients, rates of descent:
claim C5, eqs 36 to 49 and 16 to 20 of the paper.

All of it is in the logits of a state, [V], in float64; the Hessian in the weights is another matter. p = softmax(z), a
the sampled token, ρ = π_θ(a)/π_old(a), d = z − z*, for KLD less its mean, since a constant is nothing to it:

=====  ====================  ===================================================  =====================
loss   gradient              Hessian                                              bound on the gradient
=====  ====================  ===================================================  =====================
SFT    p − 1_a               diag(p) − ppᵀ                                        √2
KLD    p − π*                diag(p) − ppᵀ                                        min(‖d‖/2, √2)
MSE    2d/V                  2/V on the diagonal                                  2‖d‖/V
LCH    tanh(d)/V             (1 − tanh² d)/V on the diagonal                      min(‖d‖/V, 1/√V)
PPO    Aρ(p − 1_a)           Aρ[diag(p) − ppᵀ − (1_a − p)(1_a − p)ᵀ]              √2 |A| ρ
=====  ====================  ===================================================  =====================

PPO's Hessian is indefinite where p_a < 1/2. From there on (1_a − p)ᵀ F⁺ (1_a − p) = (1 − p_a)/p_a is at most 1, F the
Fisher matrix diag(p) − ppᵀ: the loss is convex where A > 0 and concave where A < 0.

The bounds of LCO go to 0 with the distance from z*; they are those of gradients that are Lipschitz, with L = 1/2, 2/V
and 1/V. PPO's knows no distance. Descent with the step 1/L has a linear rate: f(z_k) ≤ (1 − μ/L)^k f(z_0), f* being 0,
with μ the least curvature on the way in directions in which the loss is not flat. The derivations are ours; the paper's
constants may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lco_lite.context import Context
from lco_lite.objectives import reference
from lco_lite.recipe import Rl
from lco_lite.study.base import FEWEST, Cell, Claim, Findings, Plot, Results, Row, Study, Table, Verdict
from lco_lite.study.dynamics import batches_by_sign, open_models
from lco_lite.train import rl as training
from lco_lite.train.methods import MicroBatch, Models, score
from lco_lite.train.training import open_optimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

OPTIONS: dict[str, Any] = {"responses": 6, "prompts": 256, "states": 48, "points": [0, 3, 10, 30, 100], "lr": 1e-4}
DESCENT = 50  # steps
CONVEX, PPO = ("sft", "kld", "mse", "lch"), ("ppo, A > 0", "ppo, A < 0")
# set before the study ran
FLAT = 1e-9  # an eigenvalue above -FLAT counts as not negative
SHARE = 0.9  # of states at which PPO's Hessian has a negative eigenvalue
SLACK = 1e-6  # of bounds and rates: rounding


class Convexity(Study):
    name = "convexity"
    labels = (name,)
    asks = "Are the losses convex in the logits, and do bounds and rates hold? (eqs 16 to 20, 36 to 49)"

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        return [Cell(self.name, seed, {}, "study.convexity:probe", OPTIONS) for seed in seeds]

    def report(self, results: Results) -> Findings:
        rows = results.of(self.name)
        claims = [*(_convex(rows, name) for name in CONVEX), *(_indefinite(rows, name) for name in PPO)]
        claims += [_bounded(rows, name) for name in CONVEX] + [
            _descends(rows, name) for name in CONVEX if name != "sft"
        ]
        title = "Least and largest eigenvalue of the Hessian along a run of LCO-KLD"
        plots = [Plot("spectra", title, lambda figure: _spectra(figure, rows), (10.0, 5.0))] if rows else []
        return Findings(claims, [_eigenvalues(rows), _rates(rows)], plots)


# the losses of one state in its logits, and their Hessians


def hessians(z: Tensor, target: Tensor, old: Tensor, action: Tensor) -> dict[str, Tensor]:
    """Loss -> its Hessian, [N, V, V], at logits ``z`` [N, V]; ``action`` [N]."""
    p, v = z.softmax(-1), z.shape[-1]
    fisher = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    one = torch.nn.functional.one_hot(action, v).to(z) - p
    ratio = (p.gather(-1, action.unsqueeze(-1)) / old.softmax(-1).gather(-1, action.unsqueeze(-1))).unsqueeze(-1)
    surrogate = ratio * (fisher - one.unsqueeze(-1) * one.unsqueeze(-2))
    flat = torch.eye(v, dtype=z.dtype).expand_as(fisher)
    lch = torch.diag_embed(1 - (z - target).tanh().square()) / v
    made = {"sft": fisher, "kld": fisher, "mse": 2 / v * flat, "lch": lch}
    return made | {"ppo, A > 0": surrogate, "ppo, A < 0": -surrogate}


def bounds(z: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss -> the bound on its gradient's norm, [N]."""
    d, v = z - target, z.shape[-1]
    centred = (d - d.mean(-1, keepdim=True)).norm(dim=-1)
    most = torch.full_like(centred, math.sqrt(2))
    lch = (d.norm(dim=-1) / v).clamp(max=1 / math.sqrt(v))
    return {"sft": most, "kld": torch.minimum(centred / 2, most), "mse": 2 * d.norm(dim=-1) / v, "lch": lch}


def losses(target: Tensor, action: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Loss -> the function of logits [N, V] that it is, [N]."""
    return {
        "sft": lambda z: -z.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1),
        "kld": lambda z: reference.kld(z, target),
        "mse": lambda z: reference.mse(z, target),
        "lch": lambda z: reference.lch(z, target),
    }


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """[N, V]: that of each state's own loss."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0]


def descent(
    name: str, loss: Callable[[Tensor], Tensor], z: Tensor, target: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """(f(z_k)/f(z_0) after ``steps`` of size 1/L, the rate's bound on it), [N] each."""
    v = z.shape[-1]
    smooth = {"kld": 0.5, "mse": 2 / v, "lch": 1 / v}[name]
    first, log_bound = loss(z), torch.zeros(len(z), dtype=z.dtype)
    for _ in range(steps):
        log_bound += torch.log1p(-(_curvature(name, z, target) / smooth).clamp(max=1))
        z = z - gradient(loss, z) / smooth
    return loss(z) / first, log_bound.exp()


def _curvature(name: str, z: Tensor, target: Tensor) -> Tensor:
    """μ [N] with f(z) ≤ ‖∇f(z)‖²/2μ (Polyak and Łojasiewicz) between z and z*."""
    v = z.shape[-1]
    if name == "mse":
        return torch.full((len(z),), 2 / v, dtype=z.dtype)
    if name == "lch":  # log cosh x ≤ (x²/tanh² x) tanh² x / 2, and x/tanh x grows with |x|
        d = (z - target).abs().amax(-1).clamp_min(1e-12)
        return (d.tanh() / d).square() / v
    # KL(π* ‖ p) ≤ Σ (p − π*)²/p ≤ ‖p − π*‖²/min p
    return z.softmax(-1).amin(-1) / 2


def probe(ctx: Context, options: Mapping[str, Any]) -> Row:
    """A run of LCO-KLD on one batch; at some of its updates the spectra, bounds and rates of some of its states."""
    models, parameters = open_models(ctx, None)
    batches, _ = batches_by_sign(ctx, models, options["prompts"], options["responses"])
    first, *others = batches.values()
    phase = first
    for other in others:
        phase = phase.and_also(other)
    rl = Rl.model_validate({"lr": options["lr"], "warmup_steps": 0, "temperature": 1.0, "top_p": 1.0})
    phase = type(phase)([], phase.limit, phase.responses, phase.grades, {}, phase.shown, phase.drawn)
    (minibatch,) = score(models, phase, [[list(range(len(phase.responses)))]], rl)
    adamw, trained = open_optimizer([p for _, p in parameters], rl), [p for _, p in parameters]
    points = []
    for update in range(max(options["points"]) + 1):
        if update in options["points"]:
            points.append({"update": update} | look(*states(models, minibatch[0], options["states"])))
        with models.policy.model.training_mode():
            adamw.zero_grad()
            training.accumulate(models, rl, None, minibatch, rl.micro_batch_tokens)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            adamw.step()
    return {"points": points}


@torch.no_grad()
def states(models: Models, micro: MicroBatch, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_θ, z*, z_old [N, V] in float64, and the sampled tokens [N], of states spread over the micro-batch."""
    head, target = models.policy.model.head, micro.target
    every = torch.linspace(0, len(micro.old) - 1, min(n, len(micro.old))).long()
    hidden = models.policy.hidden(micro.batch)[every]
    target = target[every]
    old = target.old_logits(head).double()
    advantages = target.through(head).project(target.shift).double()
    best = reference.optimal_logits(old, advantages, target.beta)
    return head.logits(hidden).double(), best, old, micro.batch.actions[every]


def look(z: Tensor, target: Tensor, old: Tensor, action: Tensor) -> dict[str, Any]:
    """Of each loss over the states: the ``least`` and ``largest`` eigenvalue, means, and the extremes; the share with a
    ``negative`` one; ``tight``, the largest gradient as a share of its bound; ``descent`` and its ``rate``."""
    made: dict[str, Any] = {}
    functions, limits = losses(target, action), bounds(z, target)
    for name, hessian in hessians(z, target, old, action).items():
        eigenvalues = torch.linalg.eigvalsh(hessian)
        least, largest = eigenvalues[:, 0], eigenvalues[:, -1]
        told = {"least": least.mean(), "lowest": least.min(), "largest": largest.mean(), "highest": largest.max()}
        told["negative"] = (least < -FLAT).double().mean()
        told["positive"] = (largest > FLAT).double().mean()
        if name in functions:
            norm = gradient(functions[name], z).norm(dim=-1)
            told["tight"] = (norm / limits[name].clamp_min(1e-300)).max()
            if name != "sft":
                far = (z - target).abs().amax(-1) > 1e-6  # where there is something left to descend
                if far.any():
                    functions_far = losses(target[far], action[far])[name]
                    reached, rate = descent(name, functions_far, z[far], target[far], DESCENT)
                    told |= {"descent": reached.mean(), "rate": rate.mean(), "excess": (reached - rate).max()}
        made[name] = {key: float(f"{value.item():.6g}") for key, value in told.items()}
    return {"losses": made}


# what the numbers say


def _all(rows: Sequence[Row], name: str, number: str) -> list[float]:
    found = [point["losses"][name].get(number) for row in rows for point in row["points"]]
    return [value for value in found if value is not None]


def _claim(name: str, says: str, threshold: str, holds: bool, why: str, rows: Sequence[Row]) -> Claim:
    if len(rows) < FEWEST:
        return Claim(name, says, threshold, "unclear", f"{why}, n = {len(rows)}." if rows else "Not measured yet.")
    verdict: Verdict = "reproduced" if holds else "not reproduced"
    return Claim(name, says, threshold, verdict, f"{why}, n = {len(rows)}.")


def _convex(rows: Sequence[Row], name: str) -> Claim:
    lowest = min(_all(rows, name, "lowest"), default=0.0)
    threshold = f"no eigenvalue of any state, update and seed lies below -{FLAT:g}."
    says = f"The Hessian of {name} is positive semidefinite."
    return _claim(f"C5, {name}", says, threshold, lowest >= -FLAT, f"Lowest eigenvalue {lowest:.3g}", rows)


def _indefinite(rows: Sequence[Row], name: str) -> Claim:
    negative, positive = (fmean(_all(rows, name, sign)) if rows else 0.0 for sign in ("negative", "positive"))
    threshold = f"{SHARE:.0%} of states have a negative eigenvalue, and as many a positive one."
    says = f"The Hessian of {name} is indefinite."
    why = f"Shares {negative:.3f} and {positive:.3f}"
    return _claim(f"C5, {name}", says, threshold, min(negative, positive) >= SHARE, why, rows)


def _bounded(rows: Sequence[Row], name: str) -> Claim:
    tight = max(_all(rows, name, "tight"), default=0.0)
    says = f"The gradient of {name} keeps to its bound."
    threshold = "no gradient of any state, update and seed is above it."
    return _claim(f"bound, {name}", says, threshold, tight <= 1 + SLACK, f"At most {tight:.4f} of it", rows)


def _descends(rows: Sequence[Row], name: str) -> Claim:
    excess, rates = max(_all(rows, name, "excess"), default=0.0), _all(rows, name, "rate")
    says = f"Descent on {name} is at least as fast as its linear rate."
    threshold = f"of no state is more left after {DESCENT} steps than the rate allows."
    left = fmean(_all(rows, name, "descent")) if rows else 0.0
    why = f"Left {left:.3g}, allowed {fmean(rates) if rates else 0.0:.4g}"
    return _claim(f"rate, {name}", says, threshold, excess <= SLACK, why, rows)


def _eigenvalues(rows: Sequence[Row]) -> Table:
    lines: list[Sequence[Any]] = []
    updates = [point["update"] for point in rows[0]["points"]] if rows else []
    for name in (*CONVEX, *PPO):
        for i, update in enumerate(updates):
            told = [row["points"][i]["losses"][name] for row in rows]
            means = [fmean(one[key] for one in told) for key in ("least", "largest", "negative", "positive")]
            lines.append([name, update, len(rows), *(f"{value:.3g}" for value in means)])
    columns = ["loss", "update", "n", "least eigenvalue", "largest", "states with a negative one", "a positive one"]
    return Table("eigenvalues", "Eigenvalues in the logits, means over states and seeds", columns, lines)


def _rates(rows: Sequence[Row]) -> Table:
    lines = []
    for name in CONVEX if rows else ():
        reached = [f"{fmean(found):.3g}" if (found := _all(rows, name, key)) else None for key in ("descent", "rate")]
        lines.append([name, f"{max(_all(rows, name, 'tight')):.4f}", *reached])
    columns = ["loss", "largest gradient / bound", f"left after {DESCENT} steps of 1/L", "allowed by the rate"]
    return Table("rates-of-descent", "Bounds and rates", columns, lines)


def _spectra(figure: Figure, rows: Sequence[Row]) -> None:
    from lco_lite.study.figures import band

    updates = [point["update"] for point in rows[0]["points"]]
    for axes, number in zip(figure.subplots(1, 2), ("least", "largest"), strict=True):
        axes.set_xscale("symlog")
        axes.set_yscale("symlog", linthresh=1e-6)
        for name in (*CONVEX, *PPO):
            band(axes, name, updates, [[p["losses"][name][number] for p in row["points"]] for row in rows])
        axes.set_title(f"{number} eigenvalue")
        axes.set_xlabel("update")
    axes.legend(ncols=2, fontsize=8)
