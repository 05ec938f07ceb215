"""The rows of a score that is not complete yet: one JSON line a batch, written as soon as the batch is graded.

    eval/TASK--STAGE.partial.jsonl    the settings, then {"pass": 0, "batch": 3, "rows": [...]}

The batches and their random numbers depend on the settings alone, so a score that was stopped anywhere goes on with the
next batch and ends in the same rows as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lco_lite import weights
from lco_lite.console import Console
from lco_lite.context import Context, InterruptGuard
from lco_lite.data.prompts import Prompt
from lco_lite.errors import DataError, Interrupted, UsageError
from lco_lite.evaluation.likelihood import choice_logprobs, letter_ids, likelihood_row, need_choices
from lco_lite.evaluation.prompts import asked_for, eval_prompts, score_name
from lco_lite.evaluation.summary import accuracy, main_first, summarise, summarise_own
from lco_lite.files import remove, write_bytes, write_errors, write_json, write_text
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.recipe import Eval, Recipe
from lco_lite.rollout.engine import Engine, Response, Sampling, in_order, open_engine
from lco_lite.rollout.lockstep import optimal_policy
from lco_lite.sequences import seeded
from lco_lite.tasks import load_task
from lco_lite.tasks.base import Item, Task

Row = dict[str, Any]


class PartialRows:
    """``rows`` by (pass, batch), as far as they are made. With other settings than the file's it starts anew."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        known = _whole_lines(path)
        same = bool(known) and known[0] == settings
        self.rows: dict[tuple[int, int], list[Row]] = {
            (line["pass"], line["batch"]): line["rows"] for line in (known[1:] if same else [])
        }
        self.dropped = bool(known) and not same
        write_bytes(path, b"".join(map(_row_line, known if same else [settings])))
        with write_errors(path):
            self._file = path.open("ab", buffering=0)  # a batch is on its way at once

    def append(self, k: int, batch: int, rows: list[Row]) -> None:
        """Keeps the rows of one batch of pass ``k``. Raises LcoError on a full disk."""
        line = memoryview(_row_line({"pass": k, "batch": batch, "rows": rows}))
        with write_errors(self.path):
            while line:
                line = line[self._file.write(line) :]
        self.rows[k, batch] = rows

    def __enter__(self) -> PartialRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a last one that was cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _row_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def score(
    ctx: Context,
    tasks: Sequence[str] | None,
    stage: str | None,
    model: str | None,
    json: bool,
    data: Path | None = None,
) -> None:
    """Scores, then a table or, for machines, one JSON object by task. ``data``: where the items are."""
    names = list(tasks or ([ctx.recipe.task] if ctx.recipe.task else []))
    if not names:
        raise UsageError("eval: name a task (`lco-lite eval --list`): the run's recipe has none")
    if data is not None and data.is_file() and len(names) > 1:
        raise UsageError(
            f"--data {data}: one file holds the items of one task, and {len(names)} are named; give a folder"
        )
    stage = "base" if model else stage or ctx.run.newest_stage()
    needed = "rm" if stage == "optimal" else stage
    if needed != "base" and not ctx.run.stage(needed).is_done():
        done = ", ".join(["base", *(s.name for s in ctx.run.stages() if s.is_done())])
        raise UsageError(f"eval --policy {stage}: that is not trained in run {ctx.run.name}; there are: {done}")
    loaded = [load_task(n, data or task_file(ctx.recipe, n)) for n in names]
    results = [evaluate_stage(ctx, task, stage, ctx.recipe.eval) for task in loaded]
    if json:
        ctx.console.emit({r["task"]: r for r in results})
    else:
        show(ctx.console, results)
    ctx.console.done(ctx.run.path / "eval")


def score_all(ctx: Context) -> list[dict[str, Any]]:
    """Every stage of the recipe, and the base where it is no model from scratch, on the recipe's evaluation tasks."""
    recipe = ctx.recipe
    stages = [*([] if recipe.model.init else ["base"]), *recipe.stages]
    return [evaluate_stage(ctx, task, s, recipe.eval) for task in eval_tasks(recipe) for s in stages]


def eval_tasks(recipe: Recipe) -> list[Task]:
    names = recipe.eval.tasks if recipe.eval.tasks is not None else [recipe.task] if recipe.task else []
    return [load_task(name, task_file(recipe, name)) for name in names]


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """The paper's table, mean ± std over seeds in percent: a row a stage, a column a task (and metric, if not pass@1).

    A task's own metrics are shown in the task's own unit.
    """
    cells = {
        (r["stage"], _column(r["task"], name)): _cell(value, percent=not r.get("own"))
        for r in results
        for name, value in r["metrics"].items()
    }
    stages, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    rows = [[stage, *(cells.get((stage, column), "") for column in columns)] for stage in stages]
    console.table("mean ± std over seeds, %", ["stage", *columns], rows)
    for r in results:
        error = "" if r["stderr"] is None else f", standard error over items {100 * r['stderr']:.1f}"
        cut = f", {100 * r['truncated']:.1f} % cut at the length limit" if r["truncated"] else ""
        console.note(f"{r['task']} {r['stage']}: {r['n']} items, {r['seeds']} seed{'s' * (r['seeds'] > 1)}{error}{cut}")


def _column(task: str, metric: str) -> str:
    return task if metric == "pass@1" else f"{task} {metric}"


def _cell(metric: Mapping[str, float | None], percent: bool) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    texts = [f"{scale * value:.{digits}f}" for value in (metric["mean"], metric["std"]) if value is not None]
    return " ± ".join(texts)


def task_file(recipe: Recipe, name: str) -> str | None:
    """``data.task`` holds the items of the recipe's own task, not of others."""
    return recipe.data.task if name == recipe.task else None


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
) -> list[Row]:
    """One graded response an item: rows of id, prompt, response, extracted, gold, right, why, truncated."""
    with seeded(seed, "eval", task.name):
        ids = [chat.prompt(p.messages) for p in prompts]
        made = in_order(engine.generate(ids, sampling))
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
    if s.samples > 1 and not task.graded:
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
    task.check(settings, len(prompts), passes_of(settings), ctx.console)
    if known is not None and responses_of(known["settings"]) == responses_of(asked):
        return scored_anew(task, settings, file, known, asked, ctx.console)
    with ctx.clock("loading"):
        role, engine = open_policy(ctx, stage)
    with ctx.clock("eval"):
        return Evaluation(ctx, role, engine, task, settings, stage, file, asked).result(prompts)


def open_policy(ctx: Context, stage: str) -> tuple[Role, Engine]:
    """What a stage decodes from. ``optimal`` is π* of eq 6: start, φ_DPO and φ_ref in step, with the recipe's β."""
    if stage != "optimal":
        role = weights.open_stage(ctx, stage)
        return role, open_engine([role], chat_of(ctx, role.model).end)
    start = weights.open_start(ctx)
    reward_model, reference = weights.open_reward_model(ctx, start)
    combine = optimal_policy(ctx.recipe.rl.beta)
    return start, open_engine([start, reward_model, reference], chat_of(ctx, start.model).end, combine)


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
    role: Role
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
        chat, room = chat_of(self.ctx, self.role.model), self.role.model.max_length - self._new_tokens()
        kept = [(p, ids) for p in found for ids in [chat.prompt(p.messages)] if len(ids) <= room]
        if not kept:
            raise DataError(
                f"no item of {self.task.name} fits the model's window of {self.role.model.max_length} tokens"
            )
        if len(kept) < len(found):
            verdict = "are left out" if not self.task.graded else "count as wrong"
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
        chat, sampling = chat_of(self.ctx, self.role.model), eval_sampling(self.settings, self.task)

        def score(k: int, b: int, slots: Sequence[Slot]) -> list[Row]:
            with seeded(self._seed(k), "eval", self.task.name, b):
                asked = [ids[i] for i, _ in slots]
                made = in_order(self.engine.generate(asked, replace(sampling, batch=len(slots))))
            pairs = zip(slots, made, strict=True)
            return [
                {"sample": j} | graded(self.task, item_of(prompts[i]), chat, response) for (i, j), response in pairs
            ]

        return score

    def _by_likelihood(self, prompts: Sequence[Prompt], ids: Sequence[list[int]]) -> ScoreBatch:
        letters = letter_ids(chat_of(self.ctx, self.role.model))

        def score(k: int, b: int, slots: Sequence[Slot]) -> list[Row]:
            items = [item_of(prompts[i]) for i, _ in slots]
            choices = [letters[: len(item.row["choices"])] for item in items]
            found = choice_logprobs(self.role, [ids[i] for i, _ in slots], choices)
            return [{"sample": 0} | likelihood_row(item, some) for item, some in zip(items, found, strict=True)]

        return score

    def _summary(self, prompts: Sequence[Prompt], passes: Sequence[Sequence[Row]], n: int) -> dict[str, Any]:
        """A task that is not right or wrong makes its own metrics of each pass."""
        result = summarise(passes, n, self.settings.samples)
        if self.settings.scoring == "likelihood":
            return result | main_first({"accuracy": result["metrics"]["pass@1"]})
        if self.task.graded:
            return result
        by_seed = {self._seed(k): rows for k, rows in enumerate(passes)}
        items = {item_of(p).id: item_of(p) for p in prompts}
        return result | own_metrics(self.task, self.settings, self.file, by_seed, items, self.ctx.console)


_SCORED_BY = "scored_by"
AnyRow = Mapping[str, Any]


def scored_by(task: Task, s: Eval) -> dict[str, Any]:
    """The part of a score's settings that its responses do not rest on."""
    return {_SCORED_BY: own} if (own := task.scored_by(s)) else {}


def responses_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a score's settings that its responses rest on."""
    return {name: value for name, value in asked.items() if name != _SCORED_BY}


def own_metrics(
    task: Task,
    s: Eval,
    file: Path,
    passes: Mapping[int, Sequence[AnyRow]],
    items: Mapping[str, Item],
    console: Console,
) -> dict[str, Any]:
    """The part of a result that the task makes; ``passes`` are the rows by seed. Its files lie beside ``file``."""
    found = []
    for seed, rows in passes.items():
        folder = file.with_suffix(".files") / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        whole = [{**row, "row": dict(items[row["id"]].row)} for row in rows]
        found.append(task.aggregate(whole, s, folder, console))
    return summarise_own(found) | {"own": True}


def scored_anew(
    task: Task, s: Eval, file: Path, known: Mapping[str, Any], asked: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """The score of the responses that are there, by another judge or reward model; replaces that in ``file``."""
    console.note(f"{task.name}: {known['stage']} has answered already; only the scores are made anew")
    passes: dict[int, list[AnyRow]] = {}
    for line in file.with_suffix(".rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        passes.setdefault(row["seed"], []).append(row)
    items = {item.id: item for item in task.items("test")}
    result = {**known, **own_metrics(task, s, file, passes, items, console), "settings": dict(asked)}
    write_json(file, result)
    return result
