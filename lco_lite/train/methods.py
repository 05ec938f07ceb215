"""The table of methods: for each family how a phase is scored, and what the loss of a micro-batch is (``METHODS``).

A user's function FILE.py:NAME stands in for a loss (``rl.objective``) or changes a target (``rl.target``); what the
public code does otherwise than the paper (``rl.variant``) comes in by the same two doors.

Legend: T response tokens of a micro-batch, N responses of the phase, d hidden width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lco_lite import ranks
from lco_lite.errors import UsageError
from lco_lite.feedback import advantages as adv
from lco_lite.finite import rows_not_finite
from lco_lite.models.language_model import Role, together
from lco_lite.objectives import authors_code
from lco_lite.objectives.distillation import Teacher, jsd_loss, minillm, mixture_weights
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.logprobs import sampled_from, token_logprobs
from lco_lite.objectives.policy_gradient import (
    ADVANTAGE_ONLY,
    POLICY_GRADIENTS,
    Clip,
    Correction,
    PolicyBatch,
    ValueHead,
    value_loss,
)
from lco_lite.objectives.targets import DenseTarget, MixedTarget, SparseTarget, Target
from lco_lite.recipe import Rl
from lco_lite.recipe.rl import OF_TOKENS
from lco_lite.sequences import Batch, collate, micro_batches
from lco_lite.train.rollouts import Phase
from lco_lite.user_code import load_function, names_function, shown

Given = TypeVar("Given", bound=PolicyBatch | Target)
Seen = dict[str, Tensor]
"""What a loss shows of the policy, per token: ``entropy``, ``logprob``, ``logit_grad_norm``, …"""


@dataclass(frozen=True)
class Models:
    """Who takes part. ``reward_model`` is φ_DPO or another φ, ``reference`` φ_ref; None where the feedback needs none.
    ``start`` is the policy before RL; ``critic`` is PPO's."""

    policy: Role
    start: Role
    reward_model: Role | None
    reference: Role | None
    critic: ValueHead | None = None


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch as π_old saw it, kept on the CPU until its turn.

    ``responses`` [T]: which response of the phase a token belongs to. ``tokens`` and ``sequences`` count the whole
    minibatch, over which the loss is a mean. ``old`` [T, d] is h_old; ``old_head``: a copy of π_old's head, if it is
    trained. ``advantages`` [T] are those of the sampled tokens. ``target`` is what LCO fits, or a teacher.
    ``per_token`` has the other numbers that a family keeps, [T] each. No response is over ``limit`` tokens long.
    """

    batch: Batch
    responses: Tensor
    tokens: int
    sequences: int
    old: Tensor
    old_head: Head | None = None
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    target: Any = None
    per_token: dict[str, Tensor] = field(default_factory=dict)
    limit: int = 1

    def to(self, device: torch.device | str) -> MicroBatch:
        old = self.old.to(device)
        moved: dict[str, Any] = {n: getattr(self, n).to(device) for n in ("batch", "responses", "advantages")}
        moved["target"] = None if self.target is None else self._target_of(self.target, old).to(device)
        moved["per_token"] = {name: value.to(device) for name, value in self.per_token.items()}
        return replace(self, old=old, **moved)

    def within(self, max_tokens: int, group: int) -> list[MicroBatch]:
        """Itself where its padded size is in ``max_tokens``, else parts that are, in units of ``group`` sequences."""
        parts = micro_batches(self.batch.lengths, max_tokens, group)
        return [self] if len(parts) == 1 else [self.only(sorted(rows)) for rows in parts]

    def only(self, rows: list[int]) -> MicroBatch:
        """These of its sequences."""
        mine = torch.isin(self.batch.rows, torch.tensor(rows))
        kept: dict[str, Any] = {name: getattr(self, name)[mine] for name in ("responses", "old")}
        kept["advantages"] = self.advantages[mine] if len(self.advantages) else self.advantages
        kept["target"] = None if self.target is None else self._target_of(self.target[mine], kept["old"])
        per_token = {name: value[mine] for name, value in self.per_token.items()}
        return replace(self, batch=self.batch.only(rows), per_token=per_token, **kept)

    def _target_of(self, target: Any, old: Tensor) -> Any:
        """``target`` shares h_old with its micro-batch: one tensor, copied once."""
        shared = isinstance(self.target, Target) and self.target.old is self.old
        return replace(target, old=old) if shared else target

    def policy_batch(self, rl: Rl, logprobs: Tensor | None = None) -> PolicyBatch:
        """What an objective sees of it beside hidden states."""
        old_logprobs, rows = self.per_token.get("old_logprobs"), self.batch.rows
        names = ("reference_logprobs", "reward_model_logprobs", "rewards")
        more: dict[str, Any] = {name: self.per_token.get(name) for name in names}
        more |= {"actions": self.batch.actions, "responses": self.responses}
        more |= {"groups": self.responses // rl.responses_per_prompt, "settings": rl.settings}
        more |= {"beta": rl.beta, "limit": self.limit}
        if (log_w := self.per_token.get("log_w")) is not None and rl.mismatch != "none":
            held = Correction(rl.mismatch, rl.mismatch_cap, rl.mismatch_low, rl.mismatch_high)
            more |= {"log_w": log_w.nan_to_num(nan=0.0), "correction": held}  # w is 1 where the engine did not tell
        return PolicyBatch(logprobs, old_logprobs, self.advantages, rows, self.tokens, self.sequences, **more)


@dataclass(frozen=True)
class Method:
    """``policy`` adds to a fresh micro-batch what the policy's base says of its tokens, ``feedback`` then what the
    reward model's says; ``compare``, where there is one, looks at all micro-batches of the phase together. ``loss`` is
    this micro-batch's part of the minibatch's mean."""

    policy: Callable[[Models, MicroBatch, Rl], MicroBatch]
    feedback: Callable[[Models, MicroBatch, Rl], MicroBatch]
    loss: Callable[[Models, MicroBatch, Tensor, Rl], tuple[Tensor, Seen]]
    compare: Callable[[Models, Phase, list[MicroBatch], Rl], list[MicroBatch]] | None = None


def method_of(rl: Rl) -> Method:
    """The row of the table. Raises UsageError for a function of the user's that does not fit the feedback."""
    own = load_function(rl.objective) if names_function(rl.objective) else None
    if rl.is_lco or (own and next(iter(inspect.signature(own).parameters), "") == "hidden"):
        return METHODS["mixed lco" if rl.is_mixed else "dense lco" if rl.is_dense else "sparse lco"]
    if own and rl.is_dense:
        raise UsageError(
            f"rl.feedback: {rl.dense} is an advantage over the whole vocabulary, and {rl.objective} takes that of "
            "sampled tokens: dpo_sampled, rule, function or reward_model; or write it as a loss on hidden states, with "
            "`hidden` as its first parameter"
        )
    return METHODS.get(rl.objective, METHODS["policy gradient"])


@torch.no_grad()
def score(
    models: Models,
    phase: Phase,
    plan: Sequence[Sequence[Sequence[int]]],
    rl: Rl,
    tell: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[MicroBatch]]:
    """The phase's minibatches (``plan``: response indices of their micro-batches), scored by the policy as it is now.

    Each micro-batch is scored in the very shape in which it is trained on, so that h_θ = h_old, and with it r = A/β,
    holds to the last bit at the first update. It leaves the device at once. The policy's base is asked about all of
    them before the reward model's: the device need not hold both. ``tell`` hears how far it is.
    """
    method, policy = method_of(rl), models.policy
    asks_all = names_function(rl.objective) or rl.target is not None
    old_head = policy.model.head.frozen() if policy.model.head.is_trained else None
    scored, scores = [], phase.scores(rl)
    total = 2 * sum(bool(places) for minibatch in plan for places in ranks.share(minibatch))
    with together(policy, models.start if rl.anchor or rl.kl_coef or asks_all else None):
        for minibatch in plan:
            tokens = sum(len(phase.examples[i].response) for places in minibatch for i in places)
            for places in filter(None, ranks.share(minibatch)):
                batch = collate([phase.examples[i] for i in places], policy.model.pad_id)
                responses, sequences = torch.tensor(places)[batch.rows], sum(map(len, minibatch))
                old = policy.hidden(batch)
                micro = MicroBatch(batch, responses, tokens, sequences, old, old_head, limit=phase.limit)
                if scores is not None:
                    micro.per_token["rewards"] = scores[responses]
                if any(phase.responses[i].logprobs is not None for i in places):
                    micro.per_token["log_w"] = log_mismatch(models, phase, micro, places, rl)
                if asks_all:
                    micro.per_token.update(policy_logprobs(models, micro, compared_at(rl)))
                scored.append(method.policy(models, micro, rl).to("cpu"))
                tell(len(scored), total)
    with together(models.reward_model, models.reference):
        for i, micro in enumerate(scored):
            if asks_all and models.reward_model is not None:
                says = logprobs(models.reward_model, micro.batch, temperature=compared_at(rl))
                micro.per_token["reward_model_logprobs"] = says.cpu()
            scored[i] = method.feedback(models, micro, rl).to("cpu")
            tell(len(scored) + i + 1, total)
    rest = iter(scored if method.compare is None else method.compare(models, phase, scored, rl))
    return [[next(rest) for places in ranks.share(minibatch) if places] for minibatch in plan]


def has_gradient(minibatch: Sequence[MicroBatch], rl: Rl) -> bool:
    """False where the gradient of its loss, of this rank's share of it, is exactly 0 whatever the policy has become.

    LCO and the other regressions pull back to their target, PPO's critic learns, a teacher is no advantage, and of a
    user's loss nothing is known: those always have one.
    """
    if rl.objective not in ADVANTAGE_ONLY:
        return True
    return any(bool((m.advantages > 0 if rl.objective == "raft" else m.advantages != 0).any()) for m in minibatch)


IN_WORDS = {
    "old": "hidden states",
    "shift": "hidden states of the reward model",
    "hidden": "hidden states of the teacher",
}
IN_WORDS |= {"shift_base": "hidden states of the reference", "reference": "hidden states before rl"}


def not_finite(minibatch: Sequence[MicroBatch]) -> dict[int, list[str]]:
    """Of responses of this rank's share for which a number was scored that is not finite, the names of those numbers
    in words: rewards, advantages, hidden states, and what else a method keeps of a token."""
    found = dict[int, list[str]]()
    for micro in minibatch:
        target = getattr(micro.target, "__dict__", {})  # a user's may be anything
        numbers = {"old": micro.old, "advantages": micro.advantages} | micro.per_token | target
        numbers.pop("log_w", None)  # NaN where the engine did not tell
        for name, values in numbers.items():
            if not isinstance(values, Tensor) or len(values) != len(micro.responses):
                continue
            if (rows := rows_not_finite(values)) is not None:
                for response in micro.responses[rows].unique().tolist():
                    told = found.setdefault(response, [])
                    if (words := IN_WORDS.get(name, name.replace("_", " "))) not in told:
                        told.append(words)
    return found


# LCO


def anchored(models: Models, micro: MicroBatch, rl: Rl) -> MicroBatch:
    """With an anchor the hidden states of the policy before RL, [T, d]."""
    more = {"reference": models.start.hidden(micro.batch)} if rl.is_lco and rl.anchor else {}
    return replace(micro, per_token=micro.per_token | more)


def score_dense(models: Models, micro: MicroBatch, rl: Rl) -> MicroBatch:
    """eq 13, or eq 12 where there is no reference: a difference of hidden states is A over the whole vocabulary."""
    reward_model = need(models.reward_model)
    head, hidden = reward_model.model.head, reward_model.hidden(micro.batch)
    if models.reference is None:
        shift, head, base = adv.log_phi_shift(hidden, head)
    else:
        before = models.reference.hidden(micro.batch)
        shift, base = adv.dpo_shift(hidden, before), before if head.softcap is not None else None  # where it begins
    micro = replace(micro, advantages=adv.sampled_advantages(shift, head, micro.batch.actions, base))
    head, start = head.on(models.policy.model.device), z_base(models, micro, rl)
    target = DenseTarget(micro.old, rl.beta, shift, shift_head=head, shift_base=base, **start)
    return replace(micro, target=target) if rl.is_mixed else with_target(models, micro, target, rl)


def sparse_targets(models: Models, phase: Phase, scored: list[MicroBatch], rl: Rl) -> list[MicroBatch]:
    """eq 11: A at the sampled token, 0 elsewhere."""
    targeted = []
    for micro in group_advantages(models, phase, scored, rl):
        target = SparseTarget(micro.old, rl.beta, micro.batch.actions, micro.advantages, **z_base(models, micro, rl))
        targeted.append(with_target(models, micro, target, rl).to("cpu"))
    return targeted


def mixed_targets(models: Models, phase: Phase, scored: list[MicroBatch], rl: Rl) -> list[MicroBatch]:
    """The dense advantage, and at the sampled token that of the response, or its own, on top of it."""
    targeted, of_tokens = [], token_advantages(whole_rewards(phase, rl), phase, scored, rl)
    for micro, sparse in zip(scored, of_tokens.split([len(m.responses) for m in scored]), strict=True):
        target = MixedTarget(**vars(micro.target), actions=micro.batch.actions, advantages=sparse)
        micro = replace(micro, advantages=micro.advantages + sparse)
        targeted.append(with_target(models, micro, target, rl).to("cpu"))
    return targeted


def lco(models: Models, micro: MicroBatch, hidden: Tensor, rl: Rl) -> tuple[Tensor, Seen]:
    """KLD, LCH or MSE between z_θ and z*, or a loss on hidden states that stands in for them."""
    head, actions, own = models.policy.model.head, micro.batch.actions, own_loss(rl)
    if own is not None:
        target, batch, is_users = micro.target, micro.policy_batch(rl), names_function(rl.objective)
        if is_users:
            target, batch = copied(target), copied(batch)
        given = own(hidden, head, target, batch)
        loss, seen = users_loss(rl.objective, given, len(hidden)) if is_users else given
    else:
        how: dict[str, Any] = {"standardise": rl.standardise, "actions": actions}
        loss, seen = lco_loss(rl.objective, hidden, head, micro.target, rl.weighting, **how)
    return loss * (len(hidden) / micro.tokens), seen


# policy gradients


def sampled(models: Models, micro: MicroBatch, rl: Rl) -> MicroBatch:
    """Log-probabilities of the sampled tokens and the KL to the policy before RL, at the temperature that policies are
    compared at; the critic's values."""
    batch, t = micro.batch, compared_at(rl)
    old = logprobs(models.policy, batch, micro.old, t)
    per_token = {"old_logprobs": old, "token_rewards": torch.zeros_like(old), "kl": torch.zeros_like(old)}
    if rl.kl_coef:
        per_token["kl"] = old - logprobs(models.start, batch, temperature=t).to(old.device)
    if models.critic is not None:
        per_token["values"] = models.critic(micro.old)
    return anchored(models, replace(micro, per_token=micro.per_token | per_token), rl)


def score_sampled(models: Models, micro: MicroBatch, rl: Rl) -> MicroBatch:
    """φ's reward of each sampled token, at temperature 1: it is eq 13, however the responses were drawn."""
    if rl.feedback != "dpo_sampled":
        return micro
    liked, before = (logprobs(need(role), micro.batch) for role in (models.reward_model, models.reference))
    return replace(micro, per_token=micro.per_token | {"token_rewards": liked - before})


def group_advantages(models: Models, phase: Phase, scored: list[MicroBatch], rl: Rl) -> list[MicroBatch]:
    """A token's own where the feedback has one a token and compares no group, else its response's."""
    rewards, owner = token_rewards(phase, scored, rl), owners(scored)
    if rl.feedback == "dpo_sampled" and rl.baseline in OF_TOKENS:
        if rl.baseline == "batch":
            rewards = rewards - torch.cat(phase.of_ranks(rewards)).mean()
        return with_advantages(scored, rewards)
    whole = torch.zeros(len(phase.responses)).index_add(0, owner, rewards)
    whole = torch.stack(phase.of_ranks(whole)).sum(0)
    return with_advantages(scored, token_advantages(whole, phase, scored, rl))


def critic_advantages(models: Models, phase: Phase, scored: list[MicroBatch], rl: Rl) -> list[MicroBatch]:
    """Generalised advantage estimation, whitened over the phase; the critic learns the returns."""
    values = joined(scored, lambda micro: micro.per_token["values"])
    advantages = adv.gae(token_rewards(phase, scored, rl), values, owners(scored), rl.gamma, rl.gae_lambda)
    returns = (advantages + values).split([len(micro.responses) for micro in scored])
    scored = [replace(m, per_token=m.per_token | {"returns": r}) for m, r in zip(scored, returns, strict=True)]
    everywhere = phase.of_ranks(advantages)
    whitened = adv.whiten(torch.cat(everywhere)).split([len(part) for part in everywhere])
    return with_advantages(scored, whitened[ranks.rank()])


def policy_gradient(models: Models, micro: MicroBatch, hidden: Tensor, rl: Rl) -> tuple[Tensor, Seen]:
    """One of ``POLICY_GRADIENTS``, or the user's."""
    gradient = POLICY_GRADIENTS.get(rl.objective) or load_function(rl.objective)
    head, t = models.policy.model.head, compared_at(rl)
    logprobs, seen = token_logprobs(hidden, head, micro.batch.actions, temperature=t)
    batch, is_users = micro.policy_batch(rl, logprobs), names_function(rl.objective)
    given = gradient(copied(batch) if is_users else batch, Clip(rl.clip_low, rl.clip_high))
    loss, told = users_loss(rl.objective, given, len(logprobs)) if is_users else given
    (slope,) = torch.autograd.grad(loss, logprobs, retain_graph=True, allow_unused=True)
    size = 0.0 if slope is None else slope.abs() * micro.tokens  # of a token's loss, as LCO's is
    norms = {name: seen[name] * size for name in ("logit_grad_norm", "logit_grad_sampled")}
    return loss, seen | norms | told


# numbers of tokens that a user's function may tell; the others of docs/metrics.md are the log's own, or made from these
TOLD: tuple[str, ...] = ("loss", "logprob", "entropy", "sampled_prob", "clipped", "kl_to_old")
TOLD += ("logit_grad_norm", "logit_grad_sampled", "logit_grad_others")


def users_loss(spec: str, given: Any, tokens: int) -> tuple[Tensor, Seen]:
    """What a function of the user's gave for so many tokens. Raises UsageError unless it is a loss, a tensor of one
    number that hangs on the policy, and diagnostics of a number a token by names of ``TOLD``."""
    wanted = "(loss, {name: numbers of the tokens}) is needed"
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], dict):
        raise UsageError(f"{spec}: {wanted}, it gave {shown(given)}")
    loss, seen = given
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.requires_grad:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
        found += ", without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise UsageError(f"{spec}: {wanted}; the loss is a tensor of one number with its gradient, it gave {found}")
    for name, value in seen.items():
        if name not in TOLD:
            accepted = f"accepted: {', '.join(TOLD)} (docs/metrics.md)"
            raise UsageError(f"{spec}: {name!r:.60} is no number that an objective tells of its tokens; {accepted}")
        if not isinstance(value, Tensor) or value.shape != (tokens,):
            found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise UsageError(f"{spec}: {name} needs a number for each of {tokens} tokens, it gave {found}")
    return loss, seen


def ppo(models: Models, micro: MicroBatch, hidden: Tensor, rl: Rl) -> tuple[Tensor, Seen]:
    """The clipped surrogate, and the critic's loss."""
    loss, seen = policy_gradient(models, micro, hidden, rl)
    values = need(models.critic)(hidden)
    old_values, returns = micro.per_token["values"], micro.per_token["returns"]
    lost = value_loss(values, old_values, returns, rl.value_clip, micro.tokens)
    a_token = lost.detach() * (micro.tokens / len(values))  # of this micro-batch, mean
    return loss + rl.value_coef * lost, seen | {"value_loss": a_token.expand(len(values))}


# distillation


def pupil(models: Models, micro: MicroBatch, rl: Rl) -> MicroBatch:
    """log π_old of the sampled tokens at temperature 1, like the divergence, and as they are compared."""
    at_1, t = logprobs(models.policy, micro.batch, micro.old), compared_at(rl)
    at_t = at_1 if t == 1 else logprobs(models.policy, micro.batch, micro.old, t)
    return replace(micro, per_token=micro.per_token | {"old_at_1": at_1, "old_logprobs": at_t})


def score_taught(models: Models, micro: MicroBatch, rl: Rl) -> MicroBatch:
    """The teacher's hidden states; the advantage of a sampled token is what MiniLLM's policy gradient makes of it, at
    temperature 1. The weight is of what was sampled, at the rollouts' temperature."""
    reward_model, batch, per_token = need(models.reward_model), micro.batch, dict(micro.per_token)
    hidden = reward_model.hidden(batch)
    teacher = Teacher(hidden, reward_model.model.head.on(models.policy.model.device))
    says, old, t = logprobs(reward_model, batch, hidden), per_token.pop("old_at_1"), compared_at(rl)
    returns = adv.mean_reward_to_go((says - old.to(says.device)).cpu(), batch.rows)
    if t != 1:
        says = logprobs(reward_model, batch, hidden, t)
    old = per_token["old_logprobs"].to(says.device)
    per_token["importance"] = mixture_weights(old, says, rl.teacher_mix)
    return replace(micro, advantages=returns, target=teacher, per_token=per_token)


def gkd(models: Models, micro: MicroBatch, hidden: Tensor, rl: Rl) -> tuple[Tensor, Seen]:
    """Agarwal et al. 2024; at β = 1, KL(π_θ ‖ φ), on the policy's own responses it is on-policy distillation."""
    loss, seen = jsd_loss(hidden, models.policy.model.head, micro.target, rl.jsd_beta, actions=micro.batch.actions)
    return loss * (len(hidden) / micro.tokens), seen


def taught(models: Models, micro: MicroBatch, hidden: Tensor, rl: Rl) -> tuple[Tensor, Seen]:
    """MiniLLM (Gu et al. 2024)."""
    head, clip, t = models.policy.model.head, Clip(rl.clip_low, rl.clip_high), compared_at(rl)
    batch = micro.policy_batch(rl, token_logprobs(hidden, head, micro.batch.actions, temperature=t)[0])
    return minillm(hidden, head, micro.target, batch, micro.per_token["importance"], clip, t)


METHODS = {
    # z* = z_old + A/β, A over the vocabulary; KLD, LCH or MSE to it (eqs 8 to 10)
    "dense lco": Method(anchored, score_dense, lco),
    # the same, A at the sampled token alone (eq 11)
    "sparse lco": Method(sampled, score_sampled, lco, sparse_targets),
    # both: A over the vocabulary, and the rewards' at the sampled token on top of it
    "mixed lco": Method(anchored, score_dense, lco, mixed_targets),
    # rewards to advantages by a baseline; the rest of POLICY_GRADIENTS, or the user's
    "policy gradient": Method(sampled, score_sampled, policy_gradient, group_advantages),
    # rewards to advantages by a critic, which learns beside the policy
    "ppo": Method(sampled, score_sampled, ppo, critic_advantages),
    # the teacher's hidden states; a divergence from it, and of MiniLLM a policy gradient of what follows too
    "opd": Method(pupil, score_taught, gkd),
    "gkd": Method(pupil, score_taught, gkd),
    "minillm": Method(pupil, score_taught, taught),
}


# what the families share


def token_rewards(phase: Phase, scored: Iterable[MicroBatch], rl: Rl) -> Tensor:
    """[T of the phase]: φ's reward of each token, less the KL to the policy before RL, and at a response's last token
    what the feedback gives the whole of it."""
    rewards = joined(scored, lambda micro: micro.per_token["token_rewards"] - rl.kl_coef * micro.per_token["kl"])
    return rewards + adv.at_last_token(whole_rewards(phase, rl), owners(scored))


def whole_rewards(phase: Phase, rl: Rl) -> Tensor:
    """[N]: what a response gets as a whole, apart from rewards that count on one side of their baseline only."""
    whole = sum((reward for reward, _ in weighted(phase, rl, "both")), torch.zeros(len(phase.responses)))
    return whole + overlong(phase, rl)


def overlong(phase: Phase, rl: Rl) -> Tensor:
    """[N]: what ``rl.overlong_buffer`` takes off."""
    if not rl.overlong_buffer:
        return torch.zeros(len(phase.responses))
    lengths = torch.tensor([float(len(e.response)) for e in phase.examples])
    return adv.overlong_penalty(lengths, phase.limit, rl.overlong_buffer * phase.limit)


def response_advantages(whole: Tensor, phase: Phase, rl: Rl) -> Tensor:
    """[N] -> [N]: ``whole`` less its baseline, and of one-sided rewards what is above theirs.

    A reward adds exactly 0 where it does not apply: what rounding leaves of it above 0 is all that raft asks for. So
    the advantage of such a response is added up of those of its parts.
    """

    def less_baseline(values: Tensor) -> Tensor:
        return adv.subtract_baseline(values, rl.baseline, rl.responses_per_prompt)

    advantages, both = less_baseline(whole), weighted(phase, rl, "both")
    complete = torch.stack([torch.ones(len(whole), dtype=torch.bool), *(applies for _, applies in both)]).all(0)
    if not complete.all():
        parts = less_baseline(whole - whole_rewards(phase, rl)) + less_baseline(overlong(phase, rl))
        for reward, applies in both:
            parts = parts + torch.where(applies, less_baseline(reward), 0.0)
        advantages = torch.where(complete, advantages, parts)
    for reward, applies in weighted(phase, rl, "positive"):
        advantages = advantages + torch.where(applies, less_baseline(reward).clamp(min=0), 0.0)
        whole = whole + reward
    return adv.divide_by_group_std(advantages, whole, rl.responses_per_prompt) if rl.scale_rewards else advantages


def weighted(phase: Phase, rl: Rl, sign: str) -> list[tuple[Tensor, Tensor]]:
    """[N] each: the rewards of this sign that are a whole response's, times their weights, and where they apply."""
    parts = {n: part for n, part in rl.reward_parts.items() if part.sign == sign and part.credit == "response"}
    applies = {name: torch.tensor([value is not None for value in phase.rewards[name]]) for name in parts}
    return [(part.weight * phase.reward(name, rl), applies[name]) for name, part in parts.items()]


def token_advantages(whole: Tensor, phase: Phase, scored: list[MicroBatch], rl: Rl) -> Tensor:
    """[N] -> [T of ``scored``]: a token has its response's advantage, and its own where the rule's word is placed."""
    advantages = response_advantages(whole, phase, rl)[owners(scored)]
    if not rl.places_rule:
        return advantages
    placed = placed_rule(phase, rl)
    places = [i for micro in scored for i in micro.responses.unique_consecutive().tolist()]
    return advantages + torch.cat([torch.empty(0), *(placed[i] for i in places)])


def placed_rule(phase: Phase, rl: Rl) -> list[Tensor]:
    """[tokens] of each response: w (r_t - b). r_t is what the rule says of the response; of a wrong one whose first
    wrong token is known +1 before it, -1 at it, and past it, in states where a right policy is never, nothing: the
    advantage is 0, and b, the mean over the phase, leaves them out."""
    part, rewards, counts = rl.rewards.rule, [], []
    for i, (example, given) in enumerate(zip(phase.examples, phase.given("rule").tolist(), strict=True)):
        reward = torch.full((len(example.response),), given)
        count = torch.ones_like(reward, dtype=torch.bool)
        wrong = phase.errors[i] if phase.errors else None
        if wrong is not None:
            reward[:wrong] = 1.0
            count[wrong + 1 :] = False
        rewards.append(reward)
        counts.append(count)
    counted, advantages = torch.cat(counts), torch.cat(rewards)
    spread = adv.subtract_baseline(advantages[counted], rl.baseline, 1)
    spread = spread.clamp(min=0) if part.sign == "positive" else spread
    advantages = torch.zeros_like(advantages).masked_scatter(counted, part.weight * spread)
    return list(advantages.split([len(reward) for reward in rewards]))


def owners(scored: Iterable[MicroBatch]) -> Tensor:
    """[T]: the response that a token belongs to."""
    return joined(scored, lambda micro: micro.responses, torch.long)


def joined(scored: Iterable[MicroBatch], of: Callable[[MicroBatch], Tensor], dtype: Any = torch.float32) -> Tensor:
    """[T of the phase], of this rank's share, which may be nothing."""
    return torch.cat([torch.empty(0, dtype=dtype), *map(of, scored)])


def with_advantages(scored: list[MicroBatch], advantages: Tensor) -> list[MicroBatch]:
    parts = advantages.split([len(micro.responses) for micro in scored])
    return [replace(micro, advantages=part) for micro, part in zip(scored, parts, strict=True)]


def z_base(models: Models, micro: MicroBatch, rl: Rl) -> dict[str, Any]:
    """What a target starts from besides h_old: the copy of a trained head, and with an anchor ``reference`` [T, d]."""
    if not rl.anchor:
        return {"old_head": micro.old_head}
    head, reference = None if micro.old_head is None else models.start.model.head, micro.per_token["reference"]
    return {"old_head": micro.old_head, "anchor": rl.anchor, "reference": reference, "reference_head": head}


def with_target(models: Models, micro: MicroBatch, target: DenseTarget | SparseTarget, rl: Rl) -> MicroBatch:
    """``reference`` is the target's from here on."""
    per_token = {name: value for name, value in micro.per_token.items() if name != "reference"}
    return replace(micro, target=own_target(models, micro, target, rl), per_token=per_token)


def own_target(models: Models, micro: MicroBatch, target: DenseTarget | SparseTarget, rl: Rl) -> Any:
    """``target`` as the user's ``rl.target``, or the public code's variant, has it."""
    change = load_function(rl.target) if rl.target else authors_code.target_hook(rl) if rl.variant.is_on else None
    if change is None:
        return target
    device = models.policy.model.device
    target, batch = target.to(device), micro.to(device).policy_batch(rl)
    if rl.target:
        target, batch = copied(target), copied(batch)
    changed = change(target, models.policy.model.head, batch)
    if rl.target:
        of_same_shape(f"rl.target, {rl.target}", changed, target)
    return changed


def of_same_shape(what: str, changed: Any, given: Target) -> None:
    """Raises UsageError unless ``changed`` is a target of the same kind, and each of its tensors of the same shape."""
    if type(changed) is not type(given):
        raise UsageError(f"{what}: a {type(given).__name__} is needed, it gave {shown(changed)}")
    for name, value in vars(given).items():
        told = getattr(changed, name)
        if isinstance(value, Tensor) and (not isinstance(told, Tensor) or told.shape != value.shape):
            found = f"shape {list(told.shape)}" if isinstance(told, Tensor) else shown(told)
            raise UsageError(f"{what}: {name} needs shape {list(value.shape)}, as it was given; it gave {found}")


def copied(given: Given) -> Given:
    """For a function of the user's: what it does to these in place stays there. A graph goes on through them."""
    values: dict[str, Any] = {field.name: getattr(given, field.name) for field in fields(given)}
    clones = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(given, **(values | clones))


def own_loss(rl: Rl) -> Callable[..., tuple[Tensor, Seen]] | None:
    """The loss on hidden states that is the user's, or the public code's variant; None: the paper's."""
    if names_function(rl.objective):
        return load_function(rl.objective)
    return authors_code.loss_hook(rl) if rl.variant.is_on else None


def policy_logprobs(models: Models, micro: MicroBatch, temperature: float) -> dict[str, Tensor]:
    """log π(a) [T] of the sampled tokens by π_old and by π_ref, the policy before RL."""
    old = logprobs(models.policy, micro.batch, micro.old, temperature)
    return {"old_logprobs": old, "reference_logprobs": logprobs(models.start, micro.batch, temperature=temperature)}


def log_mismatch(models: Models, phase: Phase, micro: MicroBatch, places: Sequence[int], rl: Rl) -> Tensor:
    """log π_old/π_sampler of the sampled tokens, [T]: how far the engine's numerics are from the trainer's. NaN where
    the engine did not tell."""
    sampled = [phase.responses[i] for i in places]
    told = [x for r in sampled for x in r.logprobs or [math.nan] * len(r.example.response)]
    heads = [role.model.head for role in (models.policy, models.reward_model) if role is not None]
    head = heads[0].prefix(min(head.rows for head in heads))  # what is drawn has a row in all of them
    t, top_p = (rl.temperature, rl.top_p) if rl.temperature else (1.0, 1.0)
    actions, told_there = (x.to(micro.old.device) for x in (micro.batch.actions, torch.tensor(told)))
    return sampled_from(micro.old, head, actions, t, top_p) - told_there


def compared_at(rl: Rl) -> float:
    """The temperature of log-probabilities: that of the rollouts for policy gradients and MiniLLM; 1 for losses of the
    logits themselves, a user's loss on hidden states among them."""
    return 1.0 if method_of(rl).loss is lco else rl.compared_at


def logprobs(role: Role, batch: Batch, hidden: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """log π(a) of the sampled tokens, [T]; ``hidden`` [T, d] where it is at hand."""
    hidden = role.hidden(batch) if hidden is None else hidden
    return token_logprobs(hidden, role.model.head, batch.actions.to(hidden.device), temperature=temperature)[0]


def need(value: Any) -> Any:
    """``value``, which the recipe makes sure of."""
    assert value is not None
    return value
