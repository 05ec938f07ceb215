"""What a run would do (``--dry-run``): what matters, in a dozen lines. It opens and refuses what the run does."""

import math
from collections.abc import Sequence
from statistics import median_high

from lco_lite.console import Console
from lco_lite.data.prompts import held_out_pairs, longest_response, pair_of, sft_examples, task_prompts
from lco_lite.files import shown_bytes
from lco_lite.models.loading import base_dtype, quiet_libraries, resolve_device, reward_device
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import dump
from lco_lite.recipe.sections import RewardModel
from lco_lite.run import Run
from lco_lite.train.before import Ahead, look_ahead
from lco_lite.train.pipeline import going_on, told_of_split, tried_rewards, up_to
from lco_lite.train.reward_model import hold_out
from lco_lite.train.rollouts import room_for
from lco_lite.train.training import none_fits

CLIPPED = 240  # characters of the example's prompt, and of its response


def preview(
    recipe: Recipe,
    run: Run,
    said: frozenset[str] | None,
    upto: str,
    fresh: bool,
    full: bool,
    console: Console,
) -> None:
    """What the command ``upto`` ("run", "sft", "rm" or "rl") would do with the run, which need not be there. Refuses
    what it refuses, before the first update; ``full`` prints the resolved recipe too."""
    quiet_libraries()
    if full:
        console.say(dump(recipe))
    last = recipe.rl.stage if upto in ("run", "rl") else upto
    through = up_to(recipe, last)
    first = (through[0] if upto == "run" else last) if fresh else None
    recipe, to_do = going_on(recipe, run, through, said, first)
    device = resolve_device(recipe.device)
    if isinstance(recipe.reward_model, RewardModel):
        reward_device(recipe.reward_model.device, device)
    ahead = look_ahead(recipe, to_do, device, run.path.parent, console, upto == "run")
    tried = tried_rewards(recipe, ahead.task) if to_do else []

    model, lora = recipe.model, recipe.model.lora
    dtype = str(base_dtype(model, device)).removeprefix("torch.")
    stored = dtype if model.quantization == "none" else f"{model.quantization}, computing in {dtype}"
    targets = lora and (lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets))
    trains = f"LoRA r {lora.r} on {targets}" if lora else "all weights"
    name = model.path or f"from scratch ({model.init and model.init.layers} layers)"
    _line(console, "model", f"{name}, {stored}, on {device}; {trains}")
    if isinstance(own := recipe.reward_model, RewardModel) and recipe.rl.needs_reward_model:
        _line(console, "φ", f"{own.path}, {own.quantization if own.quantization != 'none' else own.dtype}")
    shown: tuple[str, str] | None = None
    for stage in through:
        if stage not in to_do:
            _line(console, stage, f"done already ({run.stage(stage).path})")
        elif stage == "sft":
            shown = _sft(recipe, ahead, console)
        elif stage == "rm":
            _rm(recipe, ahead, console)
        else:
            _rl(recipe, ahead, console)
    if shown is None and ahead.prompts:
        shown = ahead.chat.prompt_text(ahead.prompts[0].messages), ""
    if shown is not None:
        prompt, response = (text if full else _clipped(text) for text in shown)
        _line(console, "example", prompt + (f"[{response}] (trained in brackets)" if response else ""))
    for text in tried:
        _line(console, *text.split(" ", 1))
    for text in told_of_split(recipe, ahead.task):
        _line(console, "held out", text.removeprefix("held out: "))
    passes = recipe.eval.seeds if recipe.eval.temperature > 0 and recipe.eval.scoring == "generation" else 1
    for task, items in ahead.scored.items():
        _line(console, "eval", f"{task}: {items} items, {passes} pass{'es' * (passes > 1)}, after each stage")
    if to_do:
        most = ", ".join(f"{stage} {shown_bytes(size)}" for stage, size in ahead.most.items())
        _line(console, "disk", f"at most {most}; {shown_bytes(ahead.free)} free under {run.path.parent}")


def _sft(recipe: Recipe, ahead: Ahead, console: Console) -> tuple[str, str]:
    """The first demonstration: prompt and response as they are trained on."""
    sft, examples = recipe.sft, sft_examples(recipe, ahead.task, ahead.chat)
    n, told = _fitting([len(one) for one in examples], min(sft.max_length, ahead.windows["sft"]), "demonstrations")
    updates = sft.max_steps or math.ceil(sft.epochs * n / sft.batch_size)
    used = _used(updates * sft.batch_size, n)
    _line(console, "sft", f"{told}; {updates} updates of {sft.batch_size}, {used}")
    decode = ahead.chat.tokenizer.decode
    return decode(examples[0].prompt), decode(examples[0].response)


def _rm(recipe: Recipe, ahead: Ahead, console: Console) -> None:
    rm = recipe.train_rm
    if recipe.data.preferences == "sampled":
        assert ahead.task is not None, "the recipe makes sure"
        n = len(task_prompts(recipe, ahead.task))
        n = min(n, rm.prompts or n)
        many = f"up to {n * rm.pairs_per_prompt} pairs"
        return _line(console, "rm", f"{many}, from {rm.samples_per_prompt} responses to each of {n} prompts")
    pairs = [pair_of(row, ahead.chat) for row in ahead.pairs]
    limit = min(rm.max_length, ahead.windows["rm"])
    _, told = _fitting([pair.longest() for pair in pairs], limit, "pairs")
    pairs = [pair for pair in pairs if pair.longest() <= limit]
    trained = pairs if held_out_pairs(recipe, ahead.chat) else hold_out(pairs, rm.held_out)[1]
    updates = rm.max_steps or math.ceil(rm.epochs * len(trained) / rm.batch_size)
    used = _used(updates * rm.batch_size, len(trained))
    _line(console, "rm", f"{told}; {updates} updates of {rm.batch_size}, {used}")


def _rl(recipe: Recipe, ahead: Ahead, console: Console) -> None:
    rl, longest = recipe.rl, longest_response(recipe)
    ids = [ahead.chat.prompt(prompt.messages) for prompt in ahead.prompts]
    rooms = [room_for(rl, ahead.chat, *one, longest) for one in zip(ahead.prompts, ids, strict=True)]
    limit = min(rl.max_length, ahead.windows["rl"])
    n, told = _fitting(rooms, limit, "prompts", [len(one) for one in ids])
    responses = rl.prompts_per_step * rl.responses_per_prompt
    updates = rl.inner_epochs * math.ceil(responses / rl.minibatch)
    strength = f", beta: {rl.beta:g}" if rl.has_beta else ""
    _line(console, rl.stage, f"objective: {rl.objective}, feedback: {rl.feedback}{strength}, lr: {rl.lr:g}")
    _line(console, "", f"{told}; {_used(rl.steps * rl.prompts_per_step, n)}; responses of at most {longest}")
    _line(console, "", f"{rl.steps} steps of {responses} responses and {updates} updates")


def _fitting(sizes: Sequence[int], limit: int, what: str, shown: Sequence[int] | None = None) -> tuple[int, str]:
    """How many are no longer than ``limit``, and that in words, with their lengths (or those ``shown``). Raises
    DataError where there is none, as the stage does."""
    kept = [told for size, told in zip(sizes, shown or sizes, strict=True) if size <= limit]
    if not kept:
        raise none_fits(what, limit)
    left_out = f" ({len(sizes) - len(kept)} more are too long)" if len(kept) < len(sizes) else ""
    return len(kept), f"{len(kept)} {what} of {min(kept)} to {max(kept)} (median {median_high(kept)}) tokens{left_out}"


def _used(drawn: int, n: int) -> str:
    return f"each used {drawn / n:.1f} times" if drawn >= n else f"{drawn} of them used, once"


def _line(console: Console, what: str, text: str) -> None:
    console.say(f"{what:9} {text}")


def _clipped(text: str) -> str:
    """On one line, without its middle where it is long."""
    line = text.replace("\n", "⏎")
    return line if len(line) <= CLIPPED else f"{line[: CLIPPED // 2]} … {line[-CLIPPED // 2 :]}"
