"""Distillation from a teacher's whole distribution: generalised Jensen-Shannon divergence, and MiniLLM's loss."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lco_lite.objectives.chunks import Gradients, Values, fused, joined, spans
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import divergence
from lco_lite.objectives.logprobs import entropy_and_logprob, gradient_values
from lco_lite.objectives.policy_gradient import Clip, PolicyBatch, surrogate


@dataclass(frozen=True)
class Teacher:
    """``hidden`` [T, d_r]: final hidden states. ``head`` is frozen."""

    hidden: Tensor
    head: Head

    def __getitem__(self, index: Tensor | slice) -> Self:
        return replace(self, hidden=self.hidden[index])

    def to(self, device: torch.device | str) -> Self:
        return replace(self, hidden=self.hidden.to(device))


def jsd_loss(
    hidden: Tensor,
    head: Head,
    teacher: Teacher,
    beta: float,
    weights: Tensor | None = None,
    chunk: int | None = None,
    actions: Tensor | None = None,
    slope: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Values]:
    """β KL(φ ‖ m) + (1−β) KL(π_θ ‖ m), m = βφ + (1−β)π_θ; KL(φ ‖ π_θ) at β = 0, KL(π_θ ‖ φ) at β = 1. Agarwal et al.
    2024; TRL 1.16. The divergence, [], is a mean over T tokens, in nats; with its diagnostics.

    ``hidden`` [T, d]: the policy's final hidden states. ``beta`` 0..1. ``weights`` [T] multiply the tokens'
    losses. The divergence is over the rows that both heads have. The rest is as in ``lco_loss``. ``slope`` [T] =
    ∂/∂log π(action) at ``temperature`` of another term of the tokens' losses adds its gradient to what is measured, not
    to the loss.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in 0..1, got {beta}")
    if hidden.dim() != 2 or len(teacher.hidden) != len(hidden):
        raise ValueError(f"hidden is {list(hidden.shape)}, the teacher's {list(teacher.hidden.shape)}")
    rows = min(head.rows, teacher.head.rows)
    head, teacher_head = head.prefix(rows), teacher.head.prefix(rows)
    weights = torch.ones(len(hidden), device=hidden.device) if weights is None else weights
    grads = Gradients(hidden, head, scale=1 / len(hidden))
    chunks = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for part in spans(len(hidden), chunk, rows, hidden.device):
            logits, taught = head.logits(hidden[part]), teacher_head.logits(teacher.hidden[part])
            taken, steep = (None if x is None else x[part] for x in (actions, slope))
            how = (weights[part], taken, steep, temperature, head.operand_dtype)
            values, grad = fused(jsd, logits, taught, beta, *how)
            del taught
            grads.add(part, grad, logits)
            del grad, logits  # before the next chunk needs the room
            chunks.append(values)
        diagnostics = joined(chunks)
    return grads.attach(diagnostics["loss"].mean()), diagnostics


def minillm(
    hidden: Tensor,
    head: Head,
    teacher: Teacher,
    batch: PolicyBatch,
    weights: Tensor,
    clip: Clip,
    temperature: float = 1.0,
) -> tuple[Tensor, Values]:
    """This micro-batch's part of w [KL(π_θ ‖ φ) − min(ρR, clip(ρ)R)]. Gu et al. 2024, section 2.2, without their
    language-modelling loss; docs/methods.md sets it beside their code and TRL's.

    The gradient of the next token is exact, that of the rest a policy gradient: ``batch.advantages`` are R, the mean
    of log φ − log π_old over the tokens that follow. ``weights`` [T]: w = π_old/π̃ at the sampled tokens, for responses
    drawn from the mixture π̃ of policy and teacher. ρ and w are of log-probabilities at ``temperature``, KL and R of
    those at 1. The diagnostics are of both parts.
    """
    ratio = batch.log_ratio.exp()
    gain, clipped = surrogate(ratio, batch.advantages, clip)
    following = -(weights * gain).sum() / batch.tokens
    slope = (weights * ratio * batch.advantages * (clipped - 1)).detach()  # of −wρR, and 0 where the clip holds it
    next_token, values = jsd_loss(
        hidden, head, teacher, 1.0, weights, actions=batch.actions, slope=slope, temperature=temperature
    )
    values["loss"] = values["loss"] - weights * gain.detach()
    return next_token * (len(hidden) / batch.tokens) + following, values | {"clipped": clipped}


def mixture_weights(old_logprobs: Tensor, teacher_logprobs: Tensor, share: float) -> Tensor:
    """w = π_old(a) / (α φ(a) + (1−α) π_old(a)), [T], with α the teacher's ``share``: MiniLLM's approximation by the
    weight of the one token, both log-probabilities at the temperature of the rollouts."""
    return 1 / (share * (teacher_logprobs - old_logprobs).exp() + (1 - share))


def jsd(
    logits: Tensor,
    teacher: Tensor,
    beta: float,
    weights: Tensor,
    actions: Tensor | None,
    slope: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> tuple[Values, Tensor]:
    """w times the divergence, and its gradient w (1−β) p (g − Σ p g), g = log p − log m; at the ends p − φ, and
    p (g − Σ p g), g = log p − log φ. Overwrites ``teacher``."""
    log_p, log_t = torch.log_softmax(logits, dim=-1), torch.log_softmax(teacher, dim=-1)
    p = log_p.exp()
    values = {} if actions is None else entropy_and_logprob(log_p, p, actions)
    if beta == 0:
        divergences, grad = divergence(log_p, log_t, teacher, None, log_p.dtype)
        loss = divergences["loss"]
    else:
        if beta == 1:
            g, scale, loss = log_p - log_t, 1.0, torch.zeros_like(log_p[:, 0])
        else:
            log_m = torch.logaddexp(log_p + math.log1p(-beta), log_t + math.log(beta))
            g, scale, loss = log_p - log_m, 1 - beta, beta * (log_t.exp() * (log_t - log_m)).sum(-1)
        inner = (p * g).sum(-1, keepdim=True)
        loss = loss + scale * inner.squeeze(-1)
        grad = g.sub_(inner).mul_(p).mul_(scale)
    grad = grad.mul_(weights.unsqueeze(-1))
    whole = grad
    if actions is not None and slope is not None:
        steep = slope.unsqueeze(-1).to(p.dtype) / temperature
        tempered = p if temperature == 1 else torch.softmax(logits / temperature, dim=-1)
        whole = (grad - steep * tempered).scatter_add_(-1, actions.unsqueeze(-1), steep)
    return {"loss": weights * loss, **values, **gradient_values(whole, actions)}, grad.to(dtype)
