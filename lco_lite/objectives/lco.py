"""Logits-convex optimisation: LCO-MSE (eq 8), LCO-LCH (eq 9) and LCO-KLD (eq 10) from hidden states.

Legend: T tokens, C tokens of a chunk, V vocabulary, d hidden width; z_θ policy logits [C, V], p = softmax(z_θ),
r = z* − z_θ the residual [C, V], q = softmax(z_old). All losses are convex in z_θ:

    kld   Σ π* (log π* − log p)           ∂/∂z = p − π*               log π* = log-softmax(log p + r)
    mse   mean over V of r²               ∂/∂z = −2 r / V             (eq 44)
    lch   mean over V of log cosh r       ∂/∂z = −tanh(r) / V         (eq 44)

``weighting`` "sum" is V times the mean. "policy" is ours: Σ q f(r − r̄) with r̄ = Σ q r, free of constants, to second
order 2 KL for f(x) = x², and it gives a token that nobody says no weight; ∂/∂z = −q (f′ − Σ q f′).

The gradient with respect to hidden states is found in the forward pass and kept, so backward is one multiplication.
"""

import functools

import torch
from torch import Tensor

from lco_lite.objectives import elementwise
from lco_lite.objectives.chunks import Gradients, asks_gradient, fused, spans
from lco_lite.objectives.head import Head
from lco_lite.objectives.targets import DenseTarget, SparseTarget

OBJECTIVES = ("kld", "lch", "mse")
WEIGHTINGS = ("mean", "sum", "policy")
AnyTarget = DenseTarget | SparseTarget
Values = dict[str, Tensor]  # per token, [C] or [T]


def lco_loss(
    objective: str,
    hidden: Tensor,
    head: Head,
    target: AnyTarget,
    weighting: str = "mean",
    chunk: int | None = None,
    standardise: bool = False,
    actions: Tensor | None = None,
) -> tuple[Tensor, Values]:
    """The loss, [], a mean over T tokens, in nats (kld) or (squared) logits, and its diagnostics.

    ``hidden`` [T, d]: final hidden states of the policy at the tokens that are trained on, and at no others. ``head``:
    the policy's. ``weighting`` over V: "mean" (the paper's), "sum" or "policy"; kld has none and ignores it.
    ``chunk``: tokens at a time, None for what memory allows. ``standardise``: divide a dense advantage by its
    deviation over V at each token. ``actions`` [T]: token ids for ``logprob``; a sparse target knows its own.

    Gradients reach ``hidden``, and the weight and bias of a trained head. The diagnostics are detached, [T] each:
    ``loss`` and ``logit_grad_norm`` (norm of the gradient of a token's loss with respect to its logits) always;
    ``entropy`` of π_θ and ``logprob`` = log π_θ(action) where the policy's logits are formed anyway: kld, and every
    objective with a soft-capped or trained head; ``kl_to_old`` = KL(π_θ ‖ π_old) for kld with a sparse target and no
    anchor. None of them costs a product with the head.

    Raises ValueError for unknown names, for sizes that do not fit, and for a target that lacks what the head needs.
    """
    _check(objective, weighting, hidden, target, standardise)
    rows = target.common_rows(head)
    head, target = head.prefix(rows), target.restrict(rows)
    target.check_heads(head)
    if actions is None and isinstance(target, SparseTarget):
        actions = target.actions
    by_moments = objective == "mse" and weighting != "policy" and target.is_hidden(head)
    asks = (asks_gradient(hidden), asks_gradient(head.weight), asks_gradient(head.bias))
    grads = Gradients(hidden, head, asks, scale=1 / len(hidden))
    chunks = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for part in spans(len(hidden), chunk, head.weight.shape[1] if by_moments else rows, hidden.device):
            h, goal, taken = hidden[part], target[part], None if actions is None else actions[part]
            if by_moments:
                values, grad, factor = _moments(weighting, h, head, goal, standardise)
                grads.put(part, grad, factor * grads.scale)
            else:
                terms = _kld if objective == "kld" else functools.partial(_regression, objective, weighting)
                values, grad, factor, logits = terms(h, head, goal, taken, standardise)
                grads.add(head, part, h, grad, logits, factor)
                del logits
            del grad  # before the next chunk needs the room
            chunks.append(values)
        diagnostics = {name: torch.cat([values[name] for values in chunks]) for name in chunks[0]}
    return grads.attach(diagnostics["loss"].mean()), diagnostics


# values, ∂loss/∂logits short of a factor, that factor, z_θ where it was formed
Terms = tuple[Values, Tensor, float, Tensor | None]


def _kld(hidden: Tensor, head: Head, target: AnyTarget, actions: Tensor | None, standardise: bool) -> Terms:
    logits, dtype = head.logits(hidden), head.operand_dtype
    if isinstance(target, DenseTarget):
        residual, _ = target.residual(hidden, head, logits, standardise)
        return *fused(elementwise.kld, logits, residual, actions, dtype), 1.0, logits
    gap, tilt = target.gap(hidden, head, logits), target.tilt(logits)
    values, grad = fused(elementwise.sparse_kld, logits, gap, target.actions, tilt, actions, dtype)
    if target.anchor:
        del values["kl_to_old"]  # it is the divergence from the anchored base
    return values, grad, 1.0, logits


def _regression(
    objective: str,
    weighting: str,
    hidden: Tensor,
    head: Head,
    target: AnyTarget,
    actions: Tensor | None,
    standardise: bool,
) -> Terms:
    logits, dtype = None if target.is_hidden(head) else head.logits(hidden), head.operand_dtype
    residual, mean = target.residual(hidden, head, logits, standardise)
    if weighting == "policy":
        values, grad = fused(elementwise.policy_weighted, objective, residual, target.old_logits(head), dtype)
        factor = 1.0
    else:
        factor = 1.0 if weighting == "sum" else 1 / head.rows  # kept out of half precision
        values, grad = fused(elementwise.summed, objective, residual, mean, factor, dtype)
    if logits is not None:
        values |= fused(elementwise.policy_values, logits, actions)
    return values, grad, factor, logits


def _moments(
    weighting: str, hidden: Tensor, head: Head, target: AnyTarget, standardise: bool
) -> tuple[Values, Tensor, float]:
    """LCO-MSE in closed form: values, ∂loss/∂hidden short of a factor, and the factor."""
    factor = float(head.rows) if weighting == "sum" else 1.0
    mean, grad = target.mean_square(hidden, head, standardise)
    norm = 2 * (mean.clamp_min(0) / head.rows).sqrt()
    return {"loss": factor * mean, "logit_grad_norm": factor * norm}, grad, factor


def _check(objective: str, weighting: str, hidden: Tensor, target: AnyTarget, standardise: bool) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")
    if hidden.dim() != 2 or not len(hidden):
        raise ValueError(f"hidden must be [T, d] with at least one token, got {list(hidden.shape)}")
    if len(target) != len(hidden):
        raise ValueError(f"hidden has {len(hidden)} tokens, the target {len(target)}")
    if standardise and isinstance(target, SparseTarget):
        raise ValueError("standardise needs a dense target: at one action it would only erase the size of A")
