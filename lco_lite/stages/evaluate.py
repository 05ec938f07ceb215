"""Scores of a stage on a task: every held-out item ``samples`` times a seed, or its choices by log-likelihood.

lco-lite eval math500 --seeds 4

Batches hold prompts of like length within a budget of tokens. Which prompts meet in a batch, and its random numbers,
depend on the prompts and the settings alone: not on the order of the data, nor on whether the score was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lco_lite.data.chat import ChatFormat
from lco_lite.data.prepare import Prompt
from lco_lite.errors import DataError, Interrupted, UsageError
from lco_lite.files import remove, write_json, write_text
from lco_lite.models.language_model import LanguageModel
from lco_lite.recipe import Eval
from lco_lite.rollout.engine import Engine, Response, Sampling
from lco_lite.rollout.local import LocalEngine
from lco_lite.rollout.lockstep import LockstepEngine, optimal_policy
from lco_lite.seeding import seeded
from lco_lite.stages import cast
from lco_lite.stages.context import Context
from lco_lite.stages.likelihood import choice_logprobs, letter_ids, likelihood_row, need_choices
from lco_lite.stages.own_metrics import check_own, own_metrics, responses_of, scored_anew
from lco_lite.stages.partial import PartialRows, Row
from lco_lite.stages.protocol import asked_for, eval_prompts, score_name
from lco_lite.stages.summary import accuracy, main_first, summarise
from lco_lite.tasks.base import Item, Task, grades
from lco_lite.telemetry.interrupt import InterruptGuard

__all__ = ["accuracy", "eval_sampling", "evaluate_stage", "passes_of", "sample_scores"]

Slot = tuple[int, int]
"""A prompt's index and the number of its sample."""
ScoreBatch = Callable[[int, int, Sequence[Slot]], list[Row]]
"""(pass, batch, its slots) -> a row a slot."""


def sample_scores(
    engine: Engine,
    chat: ChatFormat,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """One graded response an item: rows of id, prompt, response, extracted, gold, right, why, truncated."""
    with seeded(seed, "eval", task.name):
        ids = [chat.prompt(p.messages) for p in prompts]
        made = engine.generate(ids, sampling, on_batch)
    return [graded(task, item_of(p), chat, response) for p, response in zip(prompts, made, strict=True)]


def graded(task: Task, item: Item, chat: ChatFormat, response: Response) -> Row:
    text = chat.text(response.example.response)
    grade = task.grade(text, item)
    return {
        "id": item.id,
        "prompt": item.prompt,
        "response": text,
        "extracted": grade.extracted,
        "gold": item.gold,
        "right": grade.right,
        "why": grade.why,
        "truncated": response.truncated,
    }


def item_of(prompt: Prompt) -> Item:
    assert prompt.item is not None, "held-out prompts come from a task"
    return prompt.item


def eval_sampling(s: Eval, task: Task) -> Sampling:
    return Sampling(s.temperature, s.top_p, s.max_new_tokens or task.max_new_tokens, s.batch)


def passes_of(s: Eval) -> int:
    """Greedy decoding and likelihoods are the same every time: one pass."""
    return 1 if s.temperature == 0 or s.scoring == "likelihood" else s.seeds


def samples_of(s: Eval, task: Task) -> int:
    """Responses an item and pass. UsageError where several have no meaning."""
    if s.samples > 1 and not grades(task):
        raise UsageError(
            f"eval.samples: task {task.name} is not right or wrong, so pass@k and maj@k do not exist for it"
        )
    if s.samples > 1 and s.temperature == 0:
        raise UsageError("eval.samples: greedy decoding makes the same response every time; set a temperature")
    return s.samples


def evaluate_stage(ctx: Context, task: Task, stage: str, settings: Eval) -> dict[str, Any]:
    """Scores a stage on a task, once: the result is kept and used again while nothing it rests on changes."""
    file = ctx.run.eval_path(score_name(task.name, settings.scoring), stage)
    samples_of(settings, task)
    prompts = eval_prompts(ctx.recipe, task, settings)
    if settings.scoring == "likelihood":
        need_choices(task, [item_of(p) for p in prompts])
        if stage == "optimal":
            raise UsageError("--scoring likelihood: π* is only decoded from; score a stage or base")
    asked = asked_for(ctx, task, stage, settings, prompts)
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if known is not None and known["settings"] == asked:
        ctx.console.note(f"{task.name}: {stage} has been scored already ({file})")
        return known
    check_own(task, settings, len(prompts), passes_of(settings), ctx.console)
    if known is not None and responses_of(known["settings"]) == responses_of(asked):
        return scored_anew(task, settings, file, known, asked, ctx.console)
    with ctx.clock("loading"):
        model, engine = open_engine(ctx, stage)
    with ctx.clock("eval"):
        return Evaluation(ctx, model, engine, task, settings, stage, file, asked).result(prompts)


def open_engine(ctx: Context, stage: str) -> tuple[LanguageModel, Engine]:
    """What a stage decodes from. ``optimal`` is π* of eq 6: start, φ_DPO and φ_ref in step, with the recipe's β."""
    if stage != "optimal":
        role = cast.open_stage(ctx, stage)
        return role.model, LocalEngine(role, chat_of(ctx, role.model).end)
    start = cast.open_start(ctx)
    reward_model, reference = cast.open_reward_model(ctx, start)
    combine = optimal_policy(ctx.recipe.rl.beta)
    return start.model, LockstepEngine([start, reward_model, reference], combine, chat_of(ctx, start.model).end)


def chat_of(ctx: Context, model: LanguageModel) -> ChatFormat:
    return ChatFormat(model.tokenizer, ctx.recipe.chat.template_args)


def batches(ids: Sequence[list[int]], samples: int, new_tokens: int, s: Eval) -> list[list[Slot]]:
    """The longest prompts first, so that what does not fit the memory shows at once: at most ``s.batch`` slots, and
    ``s.batch_tokens`` tokens if every response takes ``new_tokens`` (a single long one may pass it)."""
    slots = [(i, j) for i in range(len(ids)) for j in range(samples)]
    groups: list[list[Slot]] = []
    for slot in sorted(slots, key=lambda slot: (-len(ids[slot[0]]), ids[slot[0]], slot)):
        width = len(ids[groups[-1][0][0]]) + new_tokens if groups else 0
        if groups and len(groups[-1]) < s.batch and width * (len(groups[-1]) + 1) <= s.batch_tokens:
            groups[-1].append(slot)
        else:
            groups.append([slot])
    return groups


@dataclass
class Evaluation:
    """One stage on one task: from prompts to the two files of a score."""

    ctx: Context
    model: LanguageModel
    engine: Engine
    task: Task
    settings: Eval
    stage: str
    file: Path
    asked: dict[str, Any]

    def result(self, found: Sequence[Prompt]) -> dict[str, Any]:
        """All passes over the items; writes ``file`` and, beside it, one row an item, sample and pass."""
        prompts, ids = self._fitting(found)
        passes = self._passes(prompts, ids)
        result = {"task": self.task.name, "stage": self.stage} | self._summary(prompts, passes, len(found))
        result |= {"settings": self.asked}
        rows = [{"seed": self._seed(k), **row} for k, made in enumerate(passes) for row in made]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.file.with_suffix(".rows.jsonl"), text)
        write_json(self.file, result)
        remove(self._partial_file())
        return result

    def _seed(self, k: int) -> int:
        return self.ctx.recipe.seed + k

    def _new_tokens(self) -> int:
        return 1 if self.settings.scoring == "likelihood" else eval_sampling(self.settings, self.task).max_new_tokens

    def _fitting(self, found: Sequence[Prompt]) -> tuple[list[Prompt], list[list[int]]]:
        """The prompts that leave room for a response, and their token ids."""
        chat, room = chat_of(self.ctx, self.model), self.model.max_length - self._new_tokens()
        kept = [(p, ids) for p in found for ids in [chat.prompt(p.messages)] if len(ids) <= room]
        if not kept:
            raise DataError(f"no item of {self.task.name} fits the model's window of {self.model.max_length} tokens")
        if len(kept) < len(found):
            verdict = "are left out" if not grades(self.task) else "count as wrong"
            self.ctx.console.warn(f"{len(found) - len(kept)} of {len(found)} items do not fit the window and {verdict}")
        return [p for p, _ in kept], [ids for _, ids in kept]

    def _partial_file(self) -> Path:
        return self.file.with_suffix(".partial.jsonl")

    def _partial(self) -> PartialRows:
        """Batches of another size hold other responses, so their size is part of what a started score rests on."""
        at_once = {"batch": self.settings.batch, "batch_tokens": self.settings.batch_tokens}
        return PartialRows(self._partial_file(), self.asked | at_once)

    def _passes(self, prompts: Sequence[Prompt], ids: Sequence[list[int]]) -> list[list[Row]]:
        """The rows of each pass in the order of the prompts, made batch by batch."""
        console, samples = self.ctx.console, self.settings.samples
        groups, n = batches(ids, samples, self._new_tokens(), self.settings), passes_of(self.settings)
        score = (
            self._by_likelihood(prompts, ids)
            if self.settings.scoring == "likelihood"
            else self._by_sampling(prompts, ids)
        )
        total, label = n * len(ids) * samples, f"{self.task.name} {self.stage}"
        with self._partial() as partial, InterruptGuard() as guard:
            done = sum(map(len, partial.rows.values()))
            if done:
                console.note(f"{label}: goes on after {done} of {total} responses")
            elif partial.dropped:
                console.note(f"{label}: starts anew, since the settings have changed")
            with console.progress(total, label, done) as line:
                for k, b in [(k, b) for k in range(n) for b in range(len(groups)) if (k, b) not in partial.rows]:
                    partial.append(k, b, score(k, b, groups[b]))
                    done += len(groups[b])
                    line.update(done)
                    if guard.requested:
                        raise Interrupted(
                            f"stopped after {done} of {total} responses; they are in {partial.path}, "
                            "and the same command goes on from there"
                        )
        made = [
            {s: r for b, g in enumerate(groups) for s, r in zip(g, partial.rows[k, b], strict=True)} for k in range(n)
        ]
        return [[one[slot] for slot in sorted(one)] for one in made]

    def _by_sampling(self, prompts: Sequence[Prompt], ids: Sequence[list[int]]) -> ScoreBatch:
        chat, sampling = chat_of(self.ctx, self.model), eval_sampling(self.settings, self.task)

        def score(k: int, b: int, slots: Sequence[Slot]) -> list[Row]:
            with seeded(self._seed(k), "eval", self.task.name, b):
                made = self.engine.generate([ids[i] for i, _ in slots], replace(sampling, batch=len(slots)))
            pairs = zip(slots, made, strict=True)
            return [
                {"sample": j} | graded(self.task, item_of(prompts[i]), chat, response) for (i, j), response in pairs
            ]

        return score

    def _by_likelihood(self, prompts: Sequence[Prompt], ids: Sequence[list[int]]) -> ScoreBatch:
        assert isinstance(self.engine, LocalEngine), "π* is refused"
        role, letters = self.engine.role, letter_ids(chat_of(self.ctx, self.model))

        def score(k: int, b: int, slots: Sequence[Slot]) -> list[Row]:
            items = [item_of(prompts[i]) for i, _ in slots]
            choices = [letters[: len(item.row["choices"])] for item in items]
            found = choice_logprobs(role, [ids[i] for i, _ in slots], choices)
            return [{"sample": 0} | likelihood_row(item, some) for item, some in zip(items, found, strict=True)]

        return score

    def _summary(self, prompts: Sequence[Prompt], passes: Sequence[Sequence[Row]], n: int) -> dict[str, Any]:
        """A task that is not right or wrong makes its own metrics of each pass."""
        result = summarise(passes, n, self.settings.samples)
        if self.settings.scoring == "likelihood":
            return result | main_first({"accuracy": result["metrics"]["pass@1"]})
        if grades(self.task):
            return result
        by_seed = {self._seed(k): rows for k, rows in enumerate(passes)}
        items = {item_of(p).id: item_of(p) for p in prompts}
        return result | own_metrics(self.task, self.settings, self.file, by_seed, items, self.ctx.console)
