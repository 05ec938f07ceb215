"""What a run would do (``--dry-run``): the resolved recipe, one example as the model sees it, each stage's work."""

import math
from collections.abc import Sequence
from statistics import median_high

from lco_lite.console import Console
from lco_lite.data.prompts import file_pairs, held_out, held_out_pairs, recipe_task, rl_prompts, sft_examples
from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import open_tokenizer, quiet_libraries
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import dump
from lco_lite.sequences import Example
from lco_lite.train.pipeline import refuse_untrainable, told_of_split, tried_rewards
from lco_lite.train.reward_model import hold_out


def preview(recipe: Recipe, console: Console) -> None:
    """Opens tokenizer and data as the stages do, and prints what they would work with; refuses what they refuse."""
    quiet_libraries()
    console.say(dump(recipe))
    refuse_untrainable(recipe)
    task, tokenizer = recipe_task(recipe), open_tokenizer(recipe.model, recipe.seed)
    chat = ChatFormat(tokenizer, recipe.chat.template_args, console.warn)
    prompts = rl_prompts(recipe, task)
    if recipe.sft.enabled:
        examples = sft_examples(recipe, task, chat)
        prompt, response = map(chat.tokenizer.decode, (examples[0].prompt, examples[0].response))
        console.say(f"one demonstration, [trained tokens in brackets]:\n{prompt}[{response}]\n")
        updates = recipe.sft.max_steps or math.ceil(recipe.sft.epochs * len(examples) / recipe.sft.batch_size)
        console.say(f"sft      {len(examples)} demonstrations of {_lengths(examples)} tokens, {updates} updates")
    else:
        console.say(f"one prompt:\n{chat.prompt_text(prompts[0].messages)}\n")
    if recipe.rl.needs_reward_model:
        console.say(f"rm       {_pairs(recipe, chat, len(prompts))}")
    rl = recipe.rl
    responses = rl.prompts_per_step * rl.responses_per_prompt
    updates = rl.inner_epochs * math.ceil(responses / rl.minibatch)
    console.say(f"rl       {len(prompts)} prompts; {rl.steps} steps of {responses} responses and {updates} updates")
    for line in [*told_of_split(recipe, task), *tried_rewards(recipe, task)]:
        console.say(line)
    if task is not None:
        items = held_out(recipe, task, recipe.eval.items)
        console.say(f"eval     {len(items)} held-out items, {recipe.eval.seeds} passes")


def _pairs(recipe: Recipe, chat: ChatFormat, prompts: int) -> str:
    rm = recipe.train_rm
    if recipe.data.preferences == "sampled":
        prompts = min(prompts, rm.prompts or prompts)
        most = prompts * rm.pairs_per_prompt
        return f"up to {most} pairs, from {rm.samples_per_prompt} responses to each of {prompts} prompts"
    pairs = file_pairs(recipe, recipe_task(recipe), chat)
    trained = pairs if held_out_pairs(recipe, chat) else hold_out(pairs, rm.held_out)[1]
    updates = rm.max_steps or math.ceil(rm.epochs * len(trained) / rm.batch_size)
    tokens = _lengths([e for pair in pairs for e in (pair.chosen, pair.rejected)])
    return f"{len(pairs)} pairs of {tokens} tokens, {updates} updates"


def _lengths(examples: Sequence[Example]) -> str:
    sizes = [len(example) for example in examples]
    return f"{min(sizes)} to {max(sizes)} (median {median_high(sizes)})"
