"""The stages' phases, by the trainers' own code, on the largest micro-batches that the recipe lets in."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lco_lite import weights
from lco_lite.data.prompts import Pair, longest_response, recipe_task
from lco_lite.errors import UsageError
from lco_lite.feedback import advantages
from lco_lite.models.language_model import together
from lco_lite.objectives.policy_gradient import ValueHead
from lco_lite.plan.counting import standing_in
from lco_lite.plan.sampling import eval_sampling, sample
from lco_lite.plan.trial import Trial
from lco_lite.recipe import Rl
from lco_lite.recipe.sections import RewardModel, Training
from lco_lite.rollout.engine import Response, Sampling
from lco_lite.rollout.lockstep import mixture
from lco_lite.sequences import Example
from lco_lite.train import reward_model, sft
from lco_lite.train import rl as rl_stage
from lco_lite.train.methods import Models, score
from lco_lite.train.rl import accumulate, kl_to_old, open_models
from lco_lite.train.rollouts import Phase
from lco_lite.train.training import StageTraining

SHORT = Example([0], [0, 0])  # goes first: its gradients are there when the largest micro-batch comes


def largest(settings: Training, window: int, most: int, response: int, size: int = 1) -> list[Example]:
    """The largest micro-batch, or ``most`` examples: of units of ``size`` sequences of at most ``max_length`` tokens,
    whichever number of them leaves the least room."""
    limit = min(settings.max_length, window)
    fits = max(1, settings.micro_batch_tokens // (size * limit))
    more = settings.micro_batch_tokens // (size * (fits + 1))
    rows, length = max((fits, limit), (fits + 1, more), key=lambda shape: math.prod(shape))
    made = min(response, length - 1)
    return [Example([0] * (length - made), [0] * made)] * min(rows, most)


def _sft(trial: Trial) -> None:
    settings, policy = trial.recipe.sft, weights.open_sft(trial.ctx)
    training = trial.training(policy, weights.trainable(trial.ctx, policy, "sft"), settings)
    examples = largest(settings, policy.model.max_length, settings.batch_size, settings.max_length)

    def update() -> None:
        for some in ([SHORT], examples):
            sft.accumulate(policy, some, settings.micro_batch_tokens)

    with policy.model.training_mode(dropout=True):
        trial.train("sft", training, update)


def _rm(trial: Trial) -> None:
    recipe, rm, longest = trial.recipe, trial.recipe.train_rm, longest_response(trial.recipe)
    start = weights.open_start(trial.ctx)
    if recipe.data.preferences == "sampled":
        drawn = Sampling(rm.temperature, rm.top_p, longest, recipe.rl.rollout_batch)
        sample(trial, "pair sampling", [start], drawn, rm.max_length)
    phi, reference = weights.open_untrained_reward_model(trial.ctx, start)
    training = trial.training(phi, weights.trainable(trial.ctx, phi, "rm"), rm)
    examples = largest(rm, start.model.max_length, rm.batch_size, longest, size=2)

    def update() -> None:
        for some in ([SHORT], examples):
            reward_model.accumulate(phi, reference, rm, [Pair(e, e) for e in some], rm.micro_batch_tokens)

    with together(reference, phi), phi.model.training_mode():
        trial.train("train-rm", training, update)
    training.let_go()
    if rm.check_items and (task := recipe_task(recipe)) is not None and task.graded:
        for role in (start, phi):
            sample(trial, "φ check", [role], eval_sampling(trial, role, rm.check_items), recipe.rl.max_length)


def _rl(trial: Trial) -> None:
    recipe, rl, longest = trial.recipe, trial.recipe.rl, longest_response(trial.recipe)
    with standing_in(rl_stage, "ValueHead", partial(_critic, trial.device)):
        models, parameters = open_models(trial.ctx)
    policy = models.policy
    training = trial.training(policy, parameters, rl)
    drawn = Sampling(rl.temperature, rl.top_p, longest, rl.rollout_batch)
    if rl.teacher_mix and models.reward_model is not None:
        sample(trial, "rl rollout", [policy, models.reward_model], drawn, rl.max_length, mixture(rl.teacher_mix))
    else:
        sample(trial, "rl rollout", [policy], drawn, rl.max_length)
    if trial.looks_at("rl score", "rl update"):
        _learn(trial, models, training, longest)
    if rl.eval_every and (task := recipe_task(recipe)) is not None and task.graded:
        sample(trial, "rl eval", [policy], eval_sampling(trial, policy, rl.eval_items), rl.max_length)


def _critic(device: torch.device, width: int) -> ValueHead:
    with device:
        critic: Any = ValueHead(width)
    critic.to = lambda device: critic  # fakes cannot be swapped
    return cast(ValueHead, critic)


def _learn(trial: Trial, models: Models, training: StageTraining, longest: int) -> None:
    rl, policy = trial.recipe.rl, models.policy
    held = trial.live.host if trial.on_card else trial.live.here
    units = largest(rl, policy.model.max_length, rl.minibatch // rl.unit, longest, rl.unit)
    examples = [example for unit in (SHORT, *units) for example in [unit] * rl.unit]
    plain = rl.model_copy(update={"baseline": "none", "scale_rewards": False, "overlong_buffer": 0.0})
    n, split = len(examples), [[list(range(rl.unit)), list(range(rl.unit, len(examples)))]]
    rewards: dict[str, list[float | None]] = {name: [0.0] * n for name in rl.reward_parts}
    phase = Phase([], longest, [Response(e, True) for e in examples], None, rewards, [False] * n, n)
    before = held.of("activations")
    with _without_numbers(rl):
        with trial.moment("rl score", trial.trained):
            minibatch = score(models, phase, split, plain)[0]
        gc.collect()
        trial.kept = (held.of("activations") - before) / sum(len(e.response) for e in examples)
        with policy.model.training_mode():
            trial.train(
                "rl update", training, lambda: accumulate(models, plain, None, minibatch, rl.micro_batch_tokens)
            )
        with trial.moment("rl score", trial.trained):
            kl_to_old(models, rl, minibatch, rl.micro_batch_tokens)


@contextlib.contextmanager
def _without_numbers(rl: Rl) -> Any:
    """What looks at single numbers on the host stands aside; a function of the user's that does cannot be planned."""

    def of_no_tokens(rewards: Tensor, *given: Any) -> Tensor:
        return torch.zeros_like(rewards)

    with standing_in(advantages, "gae", of_no_tokens), standing_in(advantages, "mean_reward_to_go", of_no_tokens):
        try:
            yield
        except UsageError:
            raise
        except Exception as e:  # whatever a function of the user's does with numbers that are not there
            if not (rl.is_own or rl.target):
                raise
            own = rl.objective if rl.is_own else rl.target
            raise UsageError(f"plan: {own} does not run on tensors without numbers: it is not planned: {e}") from e


def _eval(trial: Trial) -> None:
    """The reward model decoded as a policy where there is one on a base of its own: it is the larger."""
    recipe = trial.recipe
    own = recipe.rl.needs_reward_model and isinstance(recipe.reward_model, RewardModel)
    role = weights.open_stage(trial.ctx, "rm" if own else recipe.rl.stage)
    sample(trial, "eval", [role], eval_sampling(trial, role), recipe.rl.max_length)


STAGES: dict[str, Callable[[Trial], None]] = {"sft": _sft, "rm": _rm, "rl": _rl, "eval": _eval}
