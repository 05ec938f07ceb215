"""What would fail late fails first: looked at before the first stage of a command, and by ``--dry-run``.

Functions and files of the user's, prompts that fit, targets of adapters, other models, tasks and judges, room on the
disk. Configs and tokenizers are opened; weights are not.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from lco_lite.console import Console
from lco_lite.data.prompts import (
    longest_response,
    pair_of,
    preference_rows,
    rewarding_task,
    rl_prompts,
    task_prompts,
)
from lco_lite.data.rows import Preference, Prompt
from lco_lite.errors import DataError, ModelError, UsageError, naming
from lco_lite.evaluation.evaluate import check_all
from lco_lite.files import shown_bytes
from lco_lite.judging.classifiers import refuse_unscorable
from lco_lite.models.chat import ChatFormat, check_same_tokenizer
from lco_lite.models.language_model import adapted_layers, linear_layers
from lco_lite.models.loading import (
    base_dtype,
    language_model_class,
    load_config,
    load_tokenizer,
    open_tokenizer,
    refuse_without_weights,
    reward_device,
    window_of,
)
from lco_lite.recipe import Recipe, Rl
from lco_lite.recipe.sections import RewardModel, Weights
from lco_lite.rollout.vllm import missing
from lco_lite.run import section
from lco_lite.tasks import graded_as
from lco_lite.tasks.base import Task
from lco_lite.trackers import refuse_missing
from lco_lite.train.methods import method_of
from lco_lite.train.rollouts import room_for
from lco_lite.train.training import none_fits
from lco_lite.user_code import load_function, names_function


@dataclass
class Ahead:
    """What the stages will work with. ``windows``: tokens that the models of ``sft``, ``rm`` and ``rl`` take;
    ``scored``: items by task; ``least`` and ``most``: bytes that they write by stage, of ``free`` ones."""

    task: Task | None
    chat: ChatFormat
    windows: Mapping[str, int]
    prompts: list[Prompt] = field(default_factory=list)
    pairs: list[Preference] = field(default_factory=list)
    scored: dict[str, int] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)
    free: float = 0.0

    def pair_tokens(self, row: Preference) -> int:
        return pair_of(row, self.chat).longest()


def look_ahead(
    recipe: Recipe, stages: Sequence[str], device: torch.device, runs: Path, console: Console, scores: bool = False
) -> Ahead:
    """Looks at all that ``stages`` will open, and where ``scores`` follow at what those will. Raises UsageError, which
    names the recipe's field, for the first thing on which the command would end later."""
    refuse_untrainable(recipe)
    rl, task = recipe.rl, rewarding_task(recipe)
    with naming("model.path"):
        tokenizer = open_tokenizer(recipe.model, recipe.seed)
    own = recipe.reward_model if isinstance(recipe.reward_model, RewardModel) else None
    used: dict[str, Weights] = {"model": recipe.model}
    teaches = rl.stage in stages and (rl.needs_reward_model or rl.dense == "logprob")
    if own is not None and ("rm" in stages or teaches):
        used["reward_model"] = own
        if own.gguf_file is None:
            with naming("reward_model.path"):
                check_same_tokenizer(tokenizer, load_tokenizer(own))
    numbers = {name: numbers_of(weights, device, name) for name, weights in used.items()}
    takes = {name: window_of(weights, tokenizer) for name, weights in used.items()}
    windows = {"sft": takes["model"], "rm": takes.get("reward_model", takes["model"]), "rl": min(takes.values())}
    ahead = Ahead(task, ChatFormat(tokenizer, recipe.chat.template_args, console.warn), windows)
    longest, most_of_pair = longest_response(recipe), min(recipe.train_rm.max_length, windows["rm"])
    if "rm" in stages and recipe.data.preferences != "sampled":
        with naming("data.preferences"):
            ahead.pairs = preference_rows(recipe, task)
            refuse_too_long(most_of_pair, "pairs", map(ahead.pair_tokens, ahead.pairs))
    elif "rm" in stages:
        assert task is not None, "the recipe makes sure"
        asked = (ahead.chat.prompt(one.messages) for one in task_prompts(recipe, task)[: recipe.train_rm.prompts])
        with naming("train_rm.max_length"):
            refuse_too_long(min(most_of_pair, windows["sft"]), "prompts", (len(one) + longest for one in asked))
    if rl.stage in stages:
        if rl.reward_classifier is not None:
            with naming("rl.reward_classifier"):
                refuse_unscorable(rl.reward_classifier)
        with naming("data.prompts"):
            ahead.prompts = rl_prompts(recipe, task)
            most_of_rl = min(rl.max_length, windows["rl"])

            def room(one: Prompt) -> int:
                return room_for(rl, ahead.chat, one, ahead.chat.prompt(one.messages), longest)

            refuse_too_long(most_of_rl, "prompts", map(room, ahead.prompts))
            if rl.on_policy < 1:
                refuse_without_demonstration(rl, (one for one in ahead.prompts if room(one) <= most_of_rl))
    looks = (rl.stage in stages and rl.eval_every > 0) or ("rm" in stages and recipe.train_rm.check_items > 0)
    if task is not None and task.graded and looks:
        with naming("eval.grader"):
            graded_as(task, recipe.eval.grader, recipe.eval.tolerance).items("test")
    if scores:
        ahead.scored = check_all(recipe, device, console)
    by_stage = {stage: numbers["reward_model" if stage == "rm" and own else "model"].trained for stage in stages}
    if recipe.model.init is not None and "sft" in stages:
        whole = recipe.model.model_copy(update={"lora": None, "train_head": True})
        by_stage["sft"] = numbers_of(whole, device, "model").trained
    ahead.least, ahead.most = written(recipe, by_stage, kept=1), written(recipe, by_stage)
    plain = {"model": "base", "reward_model": "base-rm"}  # what a GGUF becomes in the run, in 16 bits
    ahead.most |= {plain[name]: 2.0 * numbers[name].all for name, one in used.items() if one.gguf_file is not None}
    ahead.free = free_bytes(runs)
    if sum(ahead.least.values()) > ahead.free:
        raise UsageError(
            f"--runs {runs}: {', '.join(stages)} {'write' if len(stages) > 1 else 'writes'} at least "
            f"{shown_bytes(sum(ahead.least.values()))} (weights and a checkpoint of each), and "
            f"{shown_bytes(ahead.free)} are free there: make room, or name another folder with --runs"
        )
    if sum(ahead.most.values()) > ahead.free:
        console.warn(
            f"up to {shown_bytes(sum(ahead.most.values()))} will be written under {runs}, where "
            f"{shown_bytes(ahead.free)} are free"
        )
    return ahead


def refuse_untrainable(recipe: Recipe) -> None:
    """Raises UsageError where gradients would pass through float16, in which scores may be made, where a function of
    the user's cannot be loaded or does not fit the feedback, and where the engine that samples, or a tracker, is not
    installed."""
    refuse_missing(recipe.trackers)
    for name, function in (("rl.objective", recipe.rl.objective), ("rl.target", recipe.rl.target)):
        if function is not None and names_function(function):
            with naming(name):
                load_function(function)
    method_of(recipe.rl)
    if recipe.rollout.engine == "vllm" and (reason := missing(recipe.model.quantization)) is not None:
        raise UsageError(reason)
    rm = recipe.reward_model
    trained: dict[str, Weights] = {"model": recipe.model}
    if isinstance(rm, RewardModel) and recipe.rl.needs_reward_model:
        trained["reward_model"] = rm
    for name, weights in trained.items():
        if weights.dtype == "float16":
            raise UsageError(
                f"{name}.dtype: float16 is too narrow for gradients: those under 6e-8 become 0, and the loss is not "
                f"scaled to keep them. Set {name}.dtype to bfloat16 or float32; eval takes float16."
            )


def refuse_too_long(limit: int, what: str, lengths: Iterable[int]) -> None:
    """Raises DataError where none of the sequences fits: as soon as one does, the others are not looked at."""
    if not any(length <= limit for length in lengths):
        raise none_fits(what, limit)


def refuse_without_demonstration(rl: Rl, prompts: Iterable[Prompt]) -> None:
    """Raises DataError for the first prompt that a demonstration may stand in for, and that has none."""
    for prompt in prompts:
        if prompt.item is None or not prompt.item.demonstration:
            raise DataError(
                f"rl.on_policy: {rl.on_policy:g} asks for demonstrations of the other prompts, and "
                f"{prompt.messages[-1]['content']!r:.80} has none; set rl.on_policy: 1"
            )


class Numbers(NamedTuple):
    """How many numbers are trained of a model, and how many it has without its adapters."""

    trained: float
    all: float


def numbers_of(weights: Weights, device: torch.device, section: str) -> Numbers:
    """Of a model that is built without any. Raises ModelError where it is none that can be trained, and for an
    adapter's target that it has not; 0 where only code that comes with the weights could tell."""
    with naming(f"{section}.path"):
        config = load_config(weights)
        kind = language_model_class(config)
        if weights.path is not None and weights.gguf_file is None:
            refuse_without_weights(Path(weights.path))
    base_dtype(weights, reward_device(weights.device, device) if isinstance(weights, RewardModel) else device)
    if weights.trust_remote_code:
        return Numbers(0.0, 0.0)
    with torch.device("meta"):
        base = kind.from_config(config, trust_remote_code=False)
    whole = float(sum(p.numel() for p in base.parameters()))
    if weights.lora is None:
        frozen = 0 if getattr(weights, "train_head", False) else base.get_output_embeddings().weight.numel()
        return Numbers(whole - frozen, whole)
    linear = linear_layers(base)
    try:
        targets, _ = adapted_layers(linear, weights.lora)
    except ModelError as e:
        raise ModelError(f"{section}.{e}") from e
    modules = dict(base.named_modules())
    ends = tuple(f".{target}" for target in targets)
    adapted = [modules[name] for name, within in linear.items() if within and f".{name}".endswith(ends)]
    return Numbers(float(weights.lora.r * sum(m.in_features + m.out_features for m in adapted)), whole)


def written(recipe: Recipe, trained: Mapping[str, float], kept: int = 3) -> dict[str, float]:
    """Bytes by stage, of how many numbers each trains: the weights, and ``kept`` checkpoints (two stay, and a third is
    being made), which have AdamW's two moments too; of rl also the best, and the one before."""
    sizes = {}
    for stage, n in trained.items():
        moments = 8.0 if getattr(recipe, section(stage)).optimizer == "adamw" else 2.0
        best = 2 * 4.0 if section(stage) == "rl" and recipe.rl.keep_best and kept > 1 else 0.0
        result = 2.0 if kept == 1 and recipe.model.lora is None else 4.0  # 16 bits, it may be
        sizes[stage] = n * (result + kept * (4.0 + moments) + best)
    return sizes


def free_bytes(folder: Path) -> float:
    """Free where ``folder`` is or will be. Raises UsageError where it cannot be written."""
    there = next(one for one in (folder, *folder.resolve().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is a file"
        raise UsageError(f"--runs {folder}: {there} {why}; name another folder with --runs")
    return float(shutil.disk_usage(there).free)
