"""Which weights play which role in a run?

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

import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from weakref import WeakSet

from torch import Tensor
from torch.nn import Parameter

from lco_lite.context import Context
from lco_lite.models.chat import check_same_tokenizer
from lco_lite.models.language_model import LanguageModel, Role, known_tokens
from lco_lite.models.loading import build_scratch, converted_gguf, load_base, load_config, load_tokenizer
from lco_lite.models.residency import FrozenWeights, make_room
from lco_lite.recipe.sections import RewardModel, Weights
from lco_lite.run import StageFolder
from lco_lite.sequences import derive

START, POLICY, REWARD = "start", "policy", "rm"


def trains_whole_model(ctx: Context, stage: str) -> bool:
    """Whether a stage trains the base's own weights: full fine-tuning, and sft of a model from scratch."""
    return ctx.recipe.model.lora is None or (stage == "sft" and ctx.recipe.model.init is not None)


def open_base(ctx: Context) -> LanguageModel:
    """The policy's base as it is before any stage; the first time it is made, or converted, into the run."""
    model, folder = ctx.recipe.model, ctx.run.path / "base"
    if model.init is None:
        return _load(ctx, model, converted_gguf(model, folder))
    if not folder.exists():
        build_scratch(model.init, folder, derive(ctx.recipe.seed, "weights"))
    return _load(ctx, model, folder)


def open_sft(ctx: Context) -> Role:
    """What the sft stage trains: a new adapter on the base, or the base's own weights."""
    model, lora = open_base(ctx), ctx.recipe.model.lora
    if lora is None or trains_whole_model(ctx, "sft"):
        return Role(model)
    model.add_adapter(START, lora, derive(ctx.recipe.seed, START))
    return Role(model, START)


def open_start(ctx: Context) -> Role:
    """The policy before RL: what sft left, or the base where the recipe has no sft."""
    return _made_by(ctx, "sft", START) if ctx.recipe.sft.enabled else Role(open_base(ctx))


def open_policy(ctx: Context, start: Role, name: str = POLICY) -> Role:
    """A copy of ``start`` to train; with adapters it shares ``start``'s base, as the adapter ``name``."""
    lora = ctx.recipe.model.lora
    if lora is None:
        return open_start(ctx)
    if start.adapter is None:
        start.model.add_adapter(name, lora, derive(ctx.recipe.seed, name))
    else:
        start.model.copy_adapter(start.adapter, name)
    return Role(start.model, name)


def open_untrained_reward_model(ctx: Context, start: Role) -> tuple[Role, Role]:
    """(reward model to train, its reference): two adapters on the policy's base, or on the reward model's own."""
    settings, own = ctx.recipe.reward_model, _own_reward_base(ctx, start)
    if own is None:
        return open_policy(ctx, start, REWARD), start
    assert isinstance(settings, RewardModel) and settings.lora is not None, "the recipe makes sure"
    own.model.add_adapter(REWARD, settings.lora, derive(ctx.recipe.seed, REWARD))
    return Role(own.model, REWARD), own


def rows_of_reward_model(ctx: Context, start: Role) -> int:
    """How many tokens the head of ``open_untrained_reward_model`` has, from config and tokenizer: no weights are
    loaded, but for a GGUF file that is converted. Raises ModelError where its tokenizer is another."""
    settings = ctx.recipe.reward_model
    if not isinstance(settings, RewardModel):
        return start.model.head.rows
    folder = converted_gguf(settings, ctx.run.path / "base-rm")
    tokenizer = load_tokenizer(settings, folder)
    check_same_tokenizer(start.model.tokenizer, tokenizer)
    return min(known_tokens(tokenizer), load_config(settings, folder).get_text_config().vocab_size)


def open_reward_model(ctx: Context, start: Role) -> tuple[Role, Role]:
    """(φ_DPO, φ_ref) as the rm stage left them."""
    own = _own_reward_base(ctx, start)
    if own is None:
        return _made_by(ctx, "rm", REWARD, start.model), start
    own.model.load_adapter(REWARD, ctx.run.stage("rm").adapter)
    return Role(own.model, REWARD), own


def open_feedback_models(ctx: Context, start: Role) -> tuple[Role | None, Role | None]:
    """(φ, φ_ref) as the recipe's feedback needs them: those of DPO; for ``logprob`` the reward model's base alone."""
    if ctx.recipe.rl.needs_reward_model:
        return open_reward_model(ctx, start)
    if ctx.recipe.rl.feedback != "logprob":
        return None, None
    return _own_reward_base(ctx, start) or start, None


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
    return _made_by(ctx, stage, POLICY, start.model)


def trainable(ctx: Context, role: Role, stage: str) -> list[tuple[str, Parameter]]:
    """(name, parameter) of what a stage trains in this role; everything else is frozen."""
    if role.adapter is not None:
        return role.model.trainable(role.adapter)
    from_scratch = stage == "sft" and ctx.recipe.model.init is not None
    return role.model.trainable_full(freeze_head=not (from_scratch or ctx.recipe.model.train_head))


def unrounded(ctx: Context, role: Role) -> dict[str, Tensor]:
    """The weights in fp32 as they lie on disk, by name, where all are trained and 16 bits are too few for that."""
    settings, base = ctx.recipe.model, role.model.base
    if role.adapter is not None or base.dtype.itemsize > 2:
        return {}
    wide = load_base(settings.model_copy(update={"dtype": "float32"}), ctx.device, Path(str(base.name_or_path)))
    return dict(wide.named_parameters())


def save(role: Role, stage: StageFolder, masters: Mapping[str, Tensor]) -> Path:
    """The stage's product: a plain PEFT adapter, or an ordinary model folder with what AdamW worked on."""
    if role.adapter is None:
        role.model.save_full(stage.model, masters)
        return stage.model
    role.model.save_adapter(role.adapter, stage.adapter)
    return stage.adapter


def _made_by(ctx: Context, stage: str, name: str, base: LanguageModel | None = None) -> Role:
    """What a stage left: a model of its own, or an adapter on the policy's base, which is opened unless given."""
    folder = ctx.run.stage(stage)
    if trains_whole_model(ctx, stage):
        return Role(_load(ctx, ctx.recipe.model, folder.model))
    base = base or open_base(ctx)
    base.load_adapter(name, folder.adapter)
    return Role(base, name)


def _own_reward_base(ctx: Context, start: Role) -> Role | None:
    """None where the reward model starts from the policy's weights."""
    settings = ctx.recipe.reward_model
    if not isinstance(settings, RewardModel):
        return None
    model = _load(ctx, settings, converted_gguf(settings, ctx.run.path / "base-rm"))
    check_same_tokenizer(start.model.tokenizer, model.tokenizer)
    return Role(model)


def _load(ctx: Context, weights: Weights, folder: Path | None) -> LanguageModel:
    """Where only what a phase needs is on the device, other bases leave before this one is there."""
    streamed = isinstance(weights, RewardModel) and weights.streaming
    by_phase = ctx.recipe.residency == "phase" or (ctx.recipe.residency == "auto" and ctx.device.type == "cuda")
    if by_phase and ctx.bases:
        gc.collect()  # one that is no longer used need not be kept
        make_room(ctx.bases)
    frozen, others = None, ctx.bases if by_phase else WeakSet[FrozenWeights]()
    if by_phase or streamed:
        frozen = partial(FrozenWeights, device=ctx.device, others=others, streamed=streamed, say=ctx.console.note)
    base = load_base(weights, ctx.device, folder, on_host=streamed)
    return LanguageModel(base, load_tokenizer(weights, folder), weights.gradient_checkpointing, frozen)
