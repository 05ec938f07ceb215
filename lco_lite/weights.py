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

What users call them, ``sft``, ``rl-kld``, ``rl`` (the newest of these), ``rl@best``, ``rl@4``: ``named_policy``.
"""

import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter

from lco_lite import ranks
from lco_lite.checkpoint import checkpoint_id, load_checkpoint
from lco_lite.context import Context
from lco_lite.errors import Diverged, UsageError
from lco_lite.files import checksums, remove, sha256, verify_sealed, write_folder, write_json
from lco_lite.models.chat import check_same_tokenizer
from lco_lite.models.fingerprint import fingerprint, local_base
from lco_lite.models.language_model import LanguageModel, Role, known_tokens
from lco_lite.models.loading import (
    build_scratch,
    converted_gguf,
    load_base,
    load_config,
    load_tokenizer,
    reward_device,
    weight_not_finite,
)
from lco_lite.models.residency import FrozenWeights, make_room
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import Init, RewardModel, Weights
from lco_lite.run import Input, Run, StageFolder, decides
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
    _built_once(model.init, folder, derive(ctx.recipe.seed, "weights"))
    return _load(ctx, model, folder)


def base_of(run: Run, recipe: Recipe, stage: str) -> tuple[Weights, Path | None]:
    """(settings, folder, or None where it is theirs) of the base that the adapter of a finished stage belongs to. One
    from a GGUF file is converted again where the run has it no more. DataError where the base has changed since."""
    refuse_other_base(recipe, run.stage(stage))
    own, model = recipe.reward_model, recipe.model
    if stage == "rm" and isinstance(own, RewardModel):
        return own, converted_gguf(own, run.path / "base-rm")
    if model.init is not None:
        return model, run.stage("sft").model if recipe.sft.enabled else run.path / "base"
    return model, converted_gguf(model, run.path / "base")


def bases(recipe: Recipe, stage: str) -> dict[str, Input]:
    """The bases on this machine that a stage is trained on, by setting; not those of the hub."""
    used: dict[str, Weights] = {"model.path": recipe.model}
    if recipe.model.lora is None and recipe.sft.enabled and stage != "sft":
        used = {}  # all weights are sft's
    if isinstance(recipe.reward_model, RewardModel) and decides(recipe, stage, "reward_model.path"):
        used["reward_model.path"] = recipe.reward_model
    places = {key: local_base(weights) for key, weights in used.items()}
    return {key: Input(str(place), fingerprint(place)) for key, place in places.items() if place is not None}


@ranks.once
def refuse_other_base(recipe: Recipe, stage: StageFolder) -> None:
    """DataError where a stage's adapter was trained on a local base that has changed since; a whole model has none."""
    if not stage.model.exists():
        stage.same_inputs(bases(recipe, stage.name))


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
    _verify(ctx, made := ctx.run.stage("rm"))
    own.model.load_adapter(REWARD, made.adapter)
    return Role(own.model, REWARD), own


def open_feedback_models(ctx: Context, start: Role) -> tuple[Role | None, Role | None]:
    """(φ, φ_ref) as the recipe's feedback needs them: those of DPO; for ``logprob`` the reward model's base alone."""
    if ctx.recipe.rl.needs_reward_model:
        return open_reward_model(ctx, start)
    if ctx.recipe.rl.dense != "logprob":
        return None, None
    return _own_reward_base(ctx, start) or start, None


def policies(run: Run) -> list[str]:
    """The names of all weights in a run, as ``open_stage`` takes them; of π* too where there is a reward model."""
    names = ["base"]
    for stage in run.stages():
        last = stage.steps_done() if stage.is_done() else None
        names += [stage.name] if last is not None else []
        names += [f"{stage.name}@best"] if stage.best_step() else []
        names += [f"{stage.name}@{step}" for step in stage.kept_steps() if step != last]
        names += ["optimal"] if stage.name == "rm" and last is not None else []
    return names


@ranks.once
def named_policy(run: Run, name: str | None) -> str:
    """What a user calls a policy of the run, as ``open_stage`` takes it. None: the one that was made last; ``rl``: the
    last made of rl stages; ``STAGE@best``: its best step by held-out score; ``STAGE@N``: step N, where its weights are
    still there. UsageError with all that are."""
    if name is None:
        run.stage(newest := run.newest_stage()).is_done()  # or says what is gone
        return newest
    name = "optimal" if name in ("pi-star", "π*") else name
    stage, _, which = name.partition("@")
    if stage == "rl":
        begun = [one.name for one in run.stages() if one.name.startswith("rl-")]
        newest = run.newest_stage("rl-")
        stage = newest if newest != "base" else begun[-1] if begun else stage
    there, found = policies(run), f"{stage}@{which}" if "@" in name else stage
    if which.isdecimal():
        folder, found = run.stage(stage), f"{stage}@{int(which)}"
        if folder.is_done() and folder.steps_done() == int(which):
            return stage
        best = folder.best_step()
        if found not in there and best and best["step"] == int(which):
            found = f"{stage}@best"
    if found not in there:
        raise UsageError(f"policy {name}: run {run.name} has no weights of that name; there are: {', '.join(there)}")
    return found


@ranks.once
def policy_id(run: Run, stage: str) -> str:
    """Another wherever the weights are others. ``stage``: as ``open_stage`` takes it, and not the base."""
    name, _, which = stage.partition("@")
    folder = run.stage(name)
    if not which:
        return folder.id()
    if which != "best":
        return f"step {which} {checkpoint_id(_checkpoint(folder, which))}"
    best, files = folder.best_step(), sorted(folder.best.glob("*/*.safetensors"))
    return " ".join([f"step {best and best['step']}", *(sha256(file)[:12] for file in files)])


def open_stage(ctx: Context, stage: str, start: Role | None = None, name: str = POLICY) -> Role:
    """What a stage made, as a policy to sample from: ``base``, ``sft``, ``rm`` or ``rl-OBJECTIVE``; with ``@best`` or
    ``@N`` what it was then. ``named_policy`` makes such a name of what a user writes. With the ``start`` that is open
    already it shares that one's base, where it can, as the adapter ``name``."""
    stage, _, which = stage.partition("@")
    if which not in ("", "best"):
        return _at_step(ctx, stage, which)
    if stage == "base":
        if start is not None and not (ctx.recipe.sft.enabled and trains_whole_model(ctx, "sft")):
            return Role(start.model)
        model = open_base(ctx)
        if ctx.adapter is None:
            return Role(model)
        model.load_adapter(POLICY, ctx.adapter)
        return Role(model, POLICY)
    start = start or open_start(ctx)
    if stage == "sft":
        return start
    if stage == "rm":
        return open_reward_model(ctx, start)[0]
    return _made_by(ctx, StageFolder(ctx.run.stage(stage).best) if which else stage, name, start.model)


def _at_step(ctx: Context, stage: str, step: str) -> Role:
    """What the stage trains, with the weights of a checkpoint."""
    folder = ctx.run.stage(stage)
    refuse_other_base(ctx.recipe, folder)
    role = open_sft(ctx) if stage == "sft" else open_start(ctx)
    if stage == "rm":
        role, _ = open_untrained_reward_model(ctx, role)
    elif stage != "sft" and ctx.recipe.model.lora is not None:
        role = open_policy(ctx, role)
    parameters = {f"weights.{name}": parameter for name, parameter in trainable(ctx, role, stage)}
    saved = load_checkpoint(_checkpoint(folder, step), "cpu", folder.owner(), parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved.tensors[name])
    return role


def _checkpoint(folder: StageFolder, step: str) -> Path:
    return folder.checkpoints / f"step-{int(step):08d}"


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


@ranks.once
def save(role: Role, stage: StageFolder, masters: Mapping[str, Tensor]) -> Path:
    """The stage's product: a plain PEFT adapter, or an ordinary model folder with what AdamW worked on. It is read
    back: raises Diverged, and leaves none, where a weight of it is not finite."""
    folder = stage.model if role.adapter is None else stage.adapter
    if role.adapter is None:
        role.model.save_full(folder, masters)
    else:
        run = next((p for p in stage.path.parents if (p / "recipe.yaml").is_file()), stage.path.parent)
        role.model.save_adapter(role.adapter, folder, run)
    if (name := weight_not_finite(folder)) is not None:
        remove(folder)
        raise Diverged(f"the weights are trained, and {name} is not finite: they are not kept")
    return folder


@ranks.once
def save_best(role: Role, stage: StageFolder, masters: Mapping[str, Tensor], best: dict[str, Any]) -> None:
    """The policy as it is now in ``best/``, in one with its step and score."""
    with write_folder(stage.best) as new:
        save(role, StageFolder(new), masters)
        write_json(new / "best.json", {**best, "files": checksums(new)})


@ranks.once
def _built_once(init: Init, folder: Path, seed: int) -> None:
    if not folder.exists():
        build_scratch(init, folder, seed)


def _made_by(ctx: Context, stage: str | StageFolder, name: str, base: LanguageModel | None = None) -> Role:
    """What a stage left: a model of its own, or an adapter on the policy's base, which is opened unless given."""
    folder = ctx.run.stage(stage) if isinstance(stage, str) else stage
    _verify(ctx, folder)
    if trains_whole_model(ctx, folder.name):
        return Role(_load(ctx, ctx.recipe.model, folder.model))
    base = base or open_base(ctx)
    base.load_adapter(name, folder.adapter)
    return Role(base, name)


def _verify(ctx: Context, folder: StageFolder) -> None:
    """A stage's product, or its best step, is about to be opened. DataError where it is not what the stage left, or the
    base is not what it was trained on."""
    if folder.name == "best":
        folder = StageFolder(folder.path.parent)
        folder.verify_best()
    else:
        folder.verify("adapter", "model")
    refuse_other_base(ctx.recipe, folder)


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
    device, streamed = ctx.device, False
    if folder is not None:
        verify_sealed(folder, f"Delete {folder}: the same command makes it again.")
    if isinstance(weights, RewardModel):
        device, streamed = reward_device(weights.device, ctx.device), weights.streaming
    by_phase = ctx.recipe.residency == "phase" or (ctx.recipe.residency == "auto" and ctx.device.type == "cuda")
    by_phase = by_phase and device == ctx.device  # another device it has for itself
    if by_phase and ctx.bases:
        gc.collect()  # one that is no longer used need not be kept
        make_room(ctx.bases)
    frozen, others = None, ctx.bases if by_phase else WeakSet[FrozenWeights]()
    if by_phase or streamed:
        frozen = partial(FrozenWeights, device=device, others=others, streamed=streamed, say=ctx.console.note)
    base = load_base(weights, device, folder, on_host=streamed)
    return LanguageModel(base, load_tokenizer(weights, folder), weights.gradient_checkpointing, frozen)
