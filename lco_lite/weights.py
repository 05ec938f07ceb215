"""Which weights play which role in a run.

==============  =======================================  ===========================================
role            adapters (``lora``)                      full fine-tuning (``lora: null``)
==============  =======================================  ===========================================
start           the base with sft's adapter, if any      sft's model, or the base
policy          a copy of start's adapter, or a new one  a copy of start's weights
reward model    ``rm`` on the same base, or on its own   a copy of start's weights, trained
reference       what the reward model started from       start
==============  =======================================  ===========================================

A model from scratch is trained whole by sft; from there on it is a base like any other.
"""

from __future__ import annotations

from pathlib import Path

from torch.nn import Parameter

from lco_lite.context import Context
from lco_lite.models.language_model import LanguageModel, Role, check_same_tokenizer
from lco_lite.models.loading import build_scratch, converted_gguf, load_base, load_tokenizer
from lco_lite.recipe.sections import RewardModel, Weights
from lco_lite.run import StageFolder
from lco_lite.sequences import derive

START, POLICY, REWARD = "start", "policy", "rm"


def trains_whole_model(ctx: Context, stage: str) -> bool:
    """Whether a stage trains the base's own weights: full fine-tuning, and sft of a model from scratch."""
    return ctx.recipe.model.lora is None or (stage == "sft" and ctx.recipe.model.init is not None)


def open_base(ctx: Context) -> LanguageModel:
    """The policy's base as it is before any stage; made or converted into the run the first time."""
    model = ctx.recipe.model
    base = ctx.run.path / "base"
    if model.init is not None:
        if not base.exists():
            build_scratch(model.init, base, derive(ctx.recipe.seed, "weights"))
        return _load(ctx, model, base)
    return _load(ctx, model, converted_gguf(model, base))


def open_sft(ctx: Context) -> Role:
    """What the sft stage trains: a new adapter on the base, or the base's own weights."""
    model = open_base(ctx)
    lora = ctx.recipe.model.lora
    if lora is None or trains_whole_model(ctx, "sft"):
        return Role(model)
    model.add_adapter(START, lora, derive(ctx.recipe.seed, START))
    return Role(model, START)


def open_start(ctx: Context) -> Role:
    """The policy before RL: what sft left, or the base where the recipe has no sft."""
    stage = ctx.run.stage("sft")
    if not ctx.recipe.sft.enabled:
        return Role(open_base(ctx))
    if trains_whole_model(ctx, "sft"):
        return Role(_load(ctx, ctx.recipe.model, stage.model))
    model = open_base(ctx)
    model.load_adapter(START, stage.adapter)
    return Role(model, START)


def open_policy(ctx: Context, start: Role) -> Role:
    """The policy that RL trains. With adapters it shares ``start``'s base."""
    return _trainable_copy(ctx, start, POLICY)


def open_untrained_reward_model(ctx: Context, start: Role) -> tuple[Role, Role]:
    """(reward model to train, its reference): two adapters on the policy's base, or on the reward model's own."""
    settings = ctx.recipe.reward_model
    if isinstance(settings, RewardModel):
        model = _own_reward_base(ctx, settings, start.model)
        assert settings.lora is not None, "the recipe makes sure"
        model.add_adapter(REWARD, settings.lora, derive(ctx.recipe.seed, REWARD))
        return Role(model, REWARD), Role(model)
    return _trainable_copy(ctx, start, REWARD), start


def open_reward_model(ctx: Context, start: Role) -> tuple[Role, Role]:
    """(φ_DPO, φ_ref) as the rm stage left them."""
    stage = ctx.run.stage("rm")
    settings = ctx.recipe.reward_model
    if isinstance(settings, RewardModel):
        model = _own_reward_base(ctx, settings, start.model)
        model.load_adapter(REWARD, stage.adapter)
        return Role(model, REWARD), Role(model)
    if trains_whole_model(ctx, "rm"):
        return Role(_load(ctx, ctx.recipe.model, stage.model)), start
    start.model.load_adapter(REWARD, stage.adapter)
    return Role(start.model, REWARD), start


def open_feedback_models(ctx: Context, start: Role) -> tuple[Role | None, Role | None]:
    """(φ, φ_ref) of the recipe's feedback: DPO's pair; for ``logprob`` the reward model's base alone; else none."""
    if ctx.recipe.rl.needs_reward_model:
        return open_reward_model(ctx, start)
    if ctx.recipe.rl.feedback == "logprob":
        settings = ctx.recipe.reward_model
        if isinstance(settings, RewardModel):
            return Role(_own_reward_base(ctx, settings, start.model)), None
        return start, None
    return None, None


def open_stage(ctx: Context, stage: str) -> Role:
    """What a stage made, as a policy to sample from: ``base``, ``sft``, ``rm`` or ``rl-OBJECTIVE``."""
    if stage == "base":
        model = open_base(ctx)
        if ctx.adapter is None:
            return Role(model)
        model.load_adapter(POLICY, ctx.adapter)
        return Role(model, POLICY)
    start = open_start(ctx)
    if stage == "sft":
        return start
    if stage == "rm":
        return open_reward_model(ctx, start)[0]
    made = ctx.run.stage(stage)
    if trains_whole_model(ctx, stage):
        return Role(_load(ctx, ctx.recipe.model, made.model))
    start.model.load_adapter(POLICY, made.adapter)
    return Role(start.model, POLICY)


def trainable(ctx: Context, role: Role, stage: str) -> list[tuple[str, Parameter]]:
    """(name, parameter) of what a stage trains in this role; everything else is frozen."""
    if role.adapter is not None:
        return role.model.trainable(role.adapter)
    from_scratch = stage == "sft" and ctx.recipe.model.init is not None
    return role.model.trainable_full(freeze_head=not (from_scratch or ctx.recipe.model.train_head))


def save(role: Role, stage: StageFolder) -> Path:
    """The stage's product: a plain PEFT adapter, or an ordinary model folder."""
    if role.adapter is None:
        role.model.save_full(stage.model)
        return stage.model
    role.model.save_adapter(role.adapter, stage.adapter)
    return stage.adapter


def _trainable_copy(ctx: Context, start: Role, name: str) -> Role:
    lora = ctx.recipe.model.lora
    if lora is None:
        return open_start(ctx)
    if start.adapter is None:
        start.model.add_adapter(name, lora, derive(ctx.recipe.seed, name))
    else:
        start.model.copy_adapter(start.adapter, name)
    return Role(start.model, name)


def _own_reward_base(ctx: Context, settings: RewardModel, policy: LanguageModel) -> LanguageModel:
    model = _load(ctx, settings, converted_gguf(settings, ctx.run.path / "base-rm"))
    check_same_tokenizer(policy.tokenizer, model.tokenizer)
    return model


def _load(ctx: Context, weights: Weights, folder: Path | None) -> LanguageModel:
    base = load_base(weights, ctx.device, folder)
    return LanguageModel(base, load_tokenizer(weights, folder), weights.gradient_checkpointing)
