"""What sampling takes: of the engine that the recipe gets, the pass that holds the most."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from lco_lite.data.prompts import longest_response, recipe_task
from lco_lite.models.language_model import Role, together
from lco_lite.plan.counting import Tag
from lco_lite.plan.trial import Trial
from lco_lite.recipe import Recipe
from lco_lite.rollout.engine import Combine, Sampling, engine_for
from lco_lite.rollout.lockstep import draw
from lco_lite.rollout.paged import PAGE, PASS_TOKENS

PAGES = "planned_pages"  # an attention that takes what a flash kernel takes over pages


def sample(
    trial: Trial,
    phase: str,
    roles: Sequence[Role],
    sampling: Sampling,
    max_length: int,
    combine: Combine | None = None,
) -> None:
    """Responses at their limit to prompts of the longest, from one role or what ``combine`` makes of several."""
    if not trial.looks_at(phase):
        return
    window = min(max_length, *(role.model.max_length for role in roles))
    prompt = trial.prompt or max(1, window - sampling.max_new_tokens)
    engine = engine_for(trial.recipe.rollout.engine, torch.device("cuda" if trial.on_card else "cpu"))
    with torch.no_grad():
        if engine == "paged" and combine is None and not roles[0].model.is_streamed:
            _paged(trial, phase, roles[0], sampling, prompt)
        else:
            _together(trial, phase, roles, sampling, prompt, combine or (lambda logits: logits[0]))


def _together(
    trial: Trial, phase: str, roles: Sequence[Role], sampling: Sampling, prompt: int, combine: Combine
) -> None:
    """A fixed batch: the prompts' pass, and that of the last token with all keys and values in the cache."""
    past = prompt + sampling.max_new_tokens - 1

    def forward(role: Role, new: int, cache: Any = None, past: int = 0) -> Any:
        ids = torch.zeros(sampling.batch, new, dtype=torch.long, device=trial.device)
        mask = torch.ones(sampling.batch, past + new, dtype=torch.long, device=trial.device)
        model: Any = role.model
        with model.use(role.adapter):
            return model.base(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )

    for first in (True, False):
        with together(*roles):
            caches = [None if first else forward(role, past).past_key_values for role in roles]
            with trial.moment(phase, _number(roles[0])) as told:
                made = [
                    forward(role, prompt) if first else forward(role, 1, cache, past)
                    for role, cache in zip(roles, caches, strict=True)
                ]
                logits = [out.logits[:, -1].float() / (sampling.temperature or 1) for out in made]
                draw(combine(logits), sampling)
                told["cache"] = sum(map(_nbytes, (out.past_key_values for out in made)))
        del caches, made, logits


def _nbytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _number(role: Role) -> int:
    model: Any = role.model
    return int(model.number)


def _paged(trial: Trial, phase: str, role: Role, sampling: Sampling, prompt: int) -> None:
    """Continuous batching: pages for all slots at the longest, and a pass over ``PASS_TOKENS`` tokens of prompts and
    responses that reads every page, on a flash kernel."""
    model: Any = role.model
    slots, width = sampling.batch, -(-(prompt + sampling.max_new_tokens) // PAGE) * PAGE
    tokens = max(PASS_TOKENS, slots)

    def ids(n: int) -> Tensor:
        return torch.zeros(1, n, dtype=torch.long, device=trial.device)

    with model.use(role.adapter):
        a_token = _nbytes(model.base(input_ids=ids(1), use_cache=True).past_key_values)
        with trial.moment(phase, model.number):
            with trial.live.tagged(Tag("cache", model.number)):
                pages = torch.empty((slots * width + 2 * PAGE) * a_token, dtype=torch.uint8, device=trial.device)
            with _flash_over_pages(model.base, slots, width):
                last = torch.zeros(slots, dtype=torch.long, device=trial.device)
                out = model.base(input_ids=ids(tokens), position_ids=ids(tokens), use_cache=False, logits_to_keep=last)
            draw(out.logits[0].float() / (sampling.temperature or 1), sampling)
        del pages


@contextlib.contextmanager
def _flash_over_pages(base: Any, slots: int, width: int) -> Iterator[None]:
    """Keys and values of a layer are read from its pages into a row, all slots' one after the other."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> tuple[Tensor, None]:
        read = slots * min(width, kw.get("sliding_window") or width)
        keys, values = (x.new_empty(1, x.shape[1], read, x.shape[3]) for x in (key, value))
        made = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        del keys, values
        return made, None

    AttentionInterface.register(PAGES, attend)
    AttentionMaskInterface.register(PAGES, lambda *args, **kw: None)
    before = base.config._attn_implementation
    base.set_attn_implementation(PAGES)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def eval_sampling(trial: Trial, role: Role, most: int | None = None) -> Sampling:
    """As many at once as ``eval.batch`` and ``eval.batch_tokens`` let in, of ``most`` items."""
    settings, longest = trial.recipe.eval, checked_response(trial.recipe)
    width = min(trial.recipe.rl.max_length, role.model.max_length)
    if trial.prompt is not None:
        width = trial.prompt + longest
    rows = max(1, min(settings.batch, most or settings.batch, settings.batch_tokens // width))
    return Sampling(settings.temperature, settings.top_p, longest, rows)


def checked_response(recipe: Recipe) -> int:
    """Tokens of the longest response of an evaluation."""
    task = recipe_task(recipe)
    return recipe.eval.max_new_tokens or (task.max_new_tokens if task else longest_response(recipe))
