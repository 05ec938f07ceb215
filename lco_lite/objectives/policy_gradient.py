"""The policy gradients that LCO is compared with, side by side. Each is a function of one micro-batch.

ρ = π_θ/π_old, A the advantage. w = π_old/π_sampler, where an engine samples in other numerics than the trainer's, is
held by ``Correction`` and multiplies the loss of what ρ is of: a token, or a whole response. The losses of the
micro-batches of a minibatch add up to its own. Ratios differ from 1 only from the second update of a rollout on: with
one update a phase the clip never acts.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lco_lite.objectives.chunks import Values


@dataclass(frozen=True)
class Correction:
    """How w is held: ``truncate``, min(w, ``cap``) (TIS, Yao et al. 2025); ``mask``, w from ``low`` to ``high`` and 0
    elsewhere (IcePop, Ling team 2025)."""

    kind: str
    cap: float
    low: float
    high: float

    def __call__(self, log_w: Tensor) -> Tensor:
        """log w -> the weight, any shape."""
        w = log_w.exp()
        return w.clamp(max=self.cap) if self.kind == "truncate" else w * ((w >= self.low) & (w <= self.high))


@dataclass(frozen=True)
class PolicyBatch:
    """What an objective, ours or a user's, is given of a micro-batch of T response tokens. Tensors are [T].

    ``logprobs``: log π_θ of the sampled tokens ``actions``, with the gradient; None for an objective over the
    vocabulary. ``rows``: which sequence of the micro-batch. ``tokens`` and ``sequences``: how many the minibatch has,
    which a loss divides by. ``reference_logprobs`` (the policy before RL) and ``reward_model_logprobs`` (φ) are None
    where no such model is open. All log-probabilities are at the rollouts' temperature (``rl.logprob_temperature``),
    and at 1 for an objective over the vocabulary. ``responses``: which response of the phase, ``groups``: which prompt.
    ``rewards``: the raw reward of the token's response, None where it has none. ``settings``: ``rl.settings``.
    ``log_w``: log π_old/π_sampler at the temperature of the rollouts; None where the engine does not tell, and w
    is 1. ``correction``: ``rl.mismatch``, None for none.
    """

    logprobs: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    rows: Tensor
    tokens: int
    sequences: int
    _: KW_ONLY
    actions: Tensor | None = None
    reference_logprobs: Tensor | None = None
    reward_model_logprobs: Tensor | None = None
    responses: Tensor | None = None
    groups: Tensor | None = None
    rewards: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    log_w: Tensor | None = None
    correction: Correction | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log ρ, [T]."""
        assert self.logprobs is not None and self.old_logprobs is not None, "a ratio needs both"
        return self.logprobs - self.old_logprobs

    def corrected(self, gain: Tensor, share: Tensor | None = None) -> Tensor:
        """``gain`` [T] times the weight of each token; with ``share`` [B], ``gain`` [B] times that of each sequence:
        (Π w_t)^share."""
        if self.correction is None or self.log_w is None:
            return gain
        log_w = self.log_w if share is None else self.per_sequence(self.log_w)[0] * share
        return gain * self.correction(log_w)

    def per_sequence(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """([B] sums over each sequence's tokens, [B] their number)."""
        zeros = values.new_zeros(int(self.rows.max()) + 1)
        return zeros.index_add(0, self.rows, values), zeros.index_add(0, self.rows, torch.ones_like(values))


@dataclass(frozen=True)
class Clip:
    """ρ is held within 1 - ``low`` and 1 + ``high``."""

    low: float
    high: float


def reinforce(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """log π_θ · A, mean over tokens. Williams 1992."""
    assert b.logprobs is not None
    return -b.corrected(b.logprobs * b.advantages).sum() / b.tokens, {}


def ppo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """min(ρA, clip(ρ)A), mean over tokens. Schulman et al. 2017, eq 7."""
    gain, clipped = surrogate(b.log_ratio.exp(), b.advantages, clip)
    return -b.corrected(gain).sum() / b.tokens, {"clipped": clipped}


def grpo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """As ppo, mean per sequence first. Shao et al. 2024, eq 3."""
    gain, clipped = surrogate(b.log_ratio.exp(), b.advantages, clip)
    total, length = b.per_sequence(b.corrected(gain))
    return -(total / length).sum() / b.sequences, {"clipped": clipped}


def dapo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """As ppo: the clip, the advantage and the choice of groups differ. Yu et al. 2025, eq 8."""
    return ppo(b, clip)


def gspo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """As ppo with one ρ a sequence, (Π ρ_t)^(1/length), mean over sequences. Zheng et al. 2025, eqs 5 and 7."""
    total, length = b.per_sequence(b.log_ratio)
    gain, clipped = surrogate((total / length).exp(), b.per_sequence(b.advantages)[0] / length, clip)
    return -b.corrected(gain, 1 / length).sum() / b.sequences, {"clipped": clipped}


def rloo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """As gspo with ρ = Π ρ_t. Ahmadian et al. 2024; TRL 1.16."""
    total, length = b.per_sequence(b.log_ratio)
    gain, clipped = surrogate(total.exp(), b.per_sequence(b.advantages)[0] / length, clip)
    return -b.corrected(gain, torch.ones_like(length)).sum() / b.sequences, {"clipped": clipped}


def surrogate(ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """(min(ρA, clip(ρ)A), 1 where the clip took the gradient away)."""
    free, held = ratio * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    return torch.minimum(free, held), (held < free).float().detach()


POLICY_GRADIENTS = {f.__name__: f for f in (reinforce, ppo, rloo, grpo, dapo, gspo)}


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
