"""The policy gradients that LCO is compared with, side by side. Each is a function of one micro-batch.

ρ = π_θ/π_old, A the advantage. w = π_old/π_sampler, where an engine samples in other numerics than the trainer's, is
held by ``Correction`` and multiplies the loss of what ρ is of: a token, or a whole response. The losses of the
micro-batches of a minibatch add up to its own. Ratios differ from 1 only from the second update of a rollout on: with
one update a phase the clip never acts.

Below them are LCO's relatives on samples: regressions of log ρ to A/β, whose minimum is the same optimal policy. At a
rollout's first update the gradient of the squared ones is a policy gradient's, whatever β.
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
        if self.kind == "truncate":
            return w.clamp(max=self.cap)
        return torch.where((w >= self.low) & (w <= self.high), w, 0.0)


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
    ``beta``: ``rl.beta``. ``limit``: the most tokens that a response may have.
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
    beta: float = 1.0
    limit: int = 1

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

    def by_prompt(self, values: Tensor) -> Tensor:
        """[B] -> [prompts, K]: the numbers of the K responses to each prompt; ``rl.whole_groups`` has them all here."""
        assert self.groups is not None, "which prompt a token belongs to is not known"
        group = self.groups.new_zeros(len(values)).scatter(0, self.rows, self.groups)
        return values[group.argsort(stable=True)].view(-1, int((group == group[0]).sum()))


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


def dr_grpo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """As ppo, with as many tokens as responses may have in place of those they have. Liu et al. 2025; TRL 1.16."""
    gain, clipped = surrogate(b.log_ratio.exp(), b.advantages, clip)
    return -b.corrected(gain).sum() / (b.sequences * b.limit), {"clipped": clipped}


def cispo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """min(ρ, 1 + clip.high) as the weight of log π_θ · A, mean over tokens. MiniMax-M1 2025, 3.1; TRL 1.16."""
    assert b.logprobs is not None
    ratio = b.log_ratio.exp().detach()
    gain = ratio.clamp(max=1 + clip.high) * b.advantages * b.logprobs
    return -b.corrected(gain).sum() / b.tokens, {"clipped": (ratio > 1 + clip.high).float()}


def dppo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """ρA as in dr_grpo, but 0 where A pushes on a probability that has moved by more than the clip: Qi et al. 2026,
    Binary-TV; verl 0.9.1, dppo_tv."""
    assert b.logprobs is not None and b.old_logprobs is not None
    moved = b.logprobs.detach().exp() - b.old_logprobs.exp()
    clipped = torch.where(b.advantages > 0, moved > clip.high, moved < -clip.low).float()
    gain = (1 - clipped) * b.log_ratio.exp() * b.advantages
    return -b.corrected(gain).sum() / (b.sequences * b.limit), {"clipped": clipped}


def surrogate(ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """(min(ρA, clip(ρ)A), 1 where the clip took the gradient away)."""
    free, held = ratio * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    return torch.minimum(free, held), (held < free).float().detach()


def raft(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """−log π_θ where A > 0, 0 elsewhere, mean over all tokens. Dong et al. 2023; Xiong et al. 2025."""
    assert b.logprobs is not None
    return -b.corrected(b.logprobs * (b.advantages > 0)).sum() / b.tokens, {}


def dro(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """(A − β log ρ)²/2β, mean over tokens. Richemond et al. 2024, eq 4, a token at a time; verl 0.9.1."""
    each = (b.advantages - b.beta * b.log_ratio).square() / (2 * b.beta)
    return each.sum() / b.tokens, {}


def pmd(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """As dro with ρ = Π ρ_t, mean over sequences: policy mirror descent. Kimi k1.5 2025, section 2.3.2."""
    return misfit(b).square().sum() / (2 * b.beta * b.sequences), {}


def rebel(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """(x_i − x_j)²/4β, x = A − β log ρ of two responses to a prompt, mean over all pairs. Gao et al. 2024."""
    x = b.by_prompt(misfit(b))
    return x.var(1).sum() * x.shape[1] / (2 * b.beta * b.sequences), {}  # the mean over pairs is twice the variance


def tpo(b: PolicyBatch, clip: Clip) -> tuple[Tensor, Values]:
    """KL(q ‖ p) over a prompt's responses, p ∝ π_θ, q ∝ π_old exp(A/β), mean over prompts. Kaddour 2026, eqs 1 to 3."""
    assert b.logprobs is not None and b.old_logprobs is not None
    now, old = (b.by_prompt(b.per_sequence(x)[0]) for x in (b.logprobs, b.old_logprobs))
    log_p, log_q = now.log_softmax(-1), (old + b.by_prompt(whole(b)) / b.beta).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    each = q * (log_q - log_p) + p - q  # the sums of p and q are 1: with them the gradient is 0 exactly where p = q
    return each.sum() * now.shape[1] / b.sequences, {}


def misfit(b: PolicyBatch) -> Tensor:
    """A − β log ρ of each sequence, [B]."""
    return whole(b) - b.beta * b.per_sequence(b.log_ratio)[0]


def whole(b: PolicyBatch) -> Tensor:
    """A of each sequence, [B]: the mean of its tokens'."""
    total, length = b.per_sequence(b.advantages)
    return total / length


POLICY_GRADIENTS = {f.__name__: f for f in (reinforce, ppo, rloo, grpo, dapo, gspo, dr_grpo, cispo, dppo)}
POLICY_GRADIENTS |= {f.__name__: f for f in (raft, dro, pmd, rebel, tpo)}
# those whose gradient is exactly 0 where every A is: A (raft: A > 0) multiplies it, and nothing else is in the loss
ADVANTAGE_ONLY = ("reinforce", "rloo", "grpo", "dapo", "gspo", "dr_grpo", "cispo", "dppo", "raft")


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
