"""``lco-lite data check``: what a recipe's training data looks like, before hours of training are spent on it.

Of every source: lengths, rows that do not fit, duplicates, pairs without contrast, the first row as the model sees it;
and which rows are evaluation items of the tasks that the recipe scores.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from lco_lite.console import Console
from lco_lite.data.overlap import EvaluationItems
from lco_lite.data.prompts import (
    demonstrations,
    held_out_prompts,
    longest_response,
    more_demonstrations,
    open_task,
    recipe_task,
    rl_prompts,
    system_text,
    without_held_out,
)
from lco_lite.data.rows import Demonstration, read_demonstrations, read_preferences, read_prompts
from lco_lite.errors import DataError, ModelError
from lco_lite.messages import Message
from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import open_tokenizer, window_of
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import RewardModel, Weights
from lco_lite.tasks.base import Task, normalised

TOLD = 5  # overlapping rows that are told one by one, the likest first
EXAMPLE = 1_200  # characters of the first row that are shown
Report: TypeAlias = dict[str, Any]  # what ``--json`` prints of one source, or of one source and one task


@dataclass(frozen=True)
class Sample:
    """A conversation and the responses that are trained on; two of them (chosen, rejected) make a pair. ``at`` is its
    place: ``row 17``, or the id of a task's item."""

    at: str
    messages: Sequence[Message]
    responses: Sequence[str] = ()


@dataclass(frozen=True)
class TrainingData:
    """Where rows come from and what they are used for. Training leaves out rows longer than ``window`` tokens;
    ``room`` is what a response may take that is yet to be sampled. ``held_out`` rows are not among ``samples``."""

    use: str
    name: str
    samples: Sequence[Sample]
    window: int
    room: int = 0
    held_out: int = 0


def check_data(recipe: Recipe, console: Console, json: bool) -> None:
    """Prints the report. Raises DataError where evaluation items are trained on and not allowed by name."""
    sources, notes, chat = recipe_sources(recipe, recipe_task(recipe)), [], None
    try:
        chat = ChatFormat(open_tokenizer(recipe.model, recipe.seed), recipe.chat.template_args, console.warn)
        sources = [replace(one, window=min(one.window, _window(one.use, recipe, chat))) for one in sources]
    except ModelError as e:
        notes.append(
            f"no tokenizer, so lengths are in characters and no template is applied: {e}"
            if chat is None
            else f"the model's own window is not known: {e}"
        )
    reports = [report(source, chat) for source in sources]
    overlaps = []
    for name in dict.fromkeys([*([recipe.task] if recipe.task else []), *(recipe.eval.tasks or [])]):
        try:
            items = EvaluationItems(open_task(recipe, name))
        except DataError as e:
            notes.append(f"overlap with {name} is not checked: {e}")
            continue
        overlaps += [overlap_report(source, items, recipe.data.allow_overlap) for source in sources]
    if recipe.rl.needs_reward_model and recipe.data.preferences == "sampled":
        notes.append("preferences: sampled from the policy later, on the prompts below")
    if json:
        console.emit({"sources": reports, "overlaps": overlaps, "notes": notes})
    else:
        show(console, reports, overlaps, notes)
    if refused := [_refusal(o) for o in overlaps if not o["allowed"]]:
        raise DataError("; ".join(refused))


def _window(use: str, recipe: Recipe, chat: ChatFormat) -> int:
    """Tokens that the models take which are trained on it, or sample after it."""
    own: list[Weights] = [recipe.reward_model] if isinstance(recipe.reward_model, RewardModel) else []
    policy: list[Weights] = [recipe.model]
    used = {"demonstrations": policy, "preferences": own or policy}.get(use, policy + own)
    return min(window_of(weights, chat.tokenizer) for weights in used)


def recipe_sources(recipe: Recipe, task: Task | None) -> list[TrainingData]:
    """The rows of each file that the recipe does not hold out, in its order; of the task the items that each stage
    takes. Raises DataError where all of a file are held out."""
    data, system, of_task = recipe.data, system_text(recipe, task), f"training items of {task.name}" if task else ""
    held, sources = held_out_prompts(recipe, task), []
    if recipe.sft.enabled:
        if data.demonstrations is None:
            samples, n = [_shown(f"item {i}", d) for i, d in enumerate(demonstrations(recipe, task), 1)], 0
        else:
            shown = read_demonstrations(data.demonstrations, system, data.columns.demonstrations)
            samples = [_shown(f"row {i}", d) for i, d in enumerate(shown, 1)]
            samples, n = _left(samples, held, data.demonstrations)
            samples += [_shown(f"item {i}", d) for i, d in enumerate(more_demonstrations(recipe), 1)]
        name = ", ".join([data.demonstrations or of_task, *recipe.sft.more_tasks])
        sources.append(TrainingData("demonstrations", name, samples, recipe.sft.max_length, held_out=n))
    if recipe.rl.needs_reward_model and data.preferences != "sampled":
        pairs = read_preferences(data.preferences, system, data.columns.preferences)
        samples = [Sample(f"pair {i}", p.messages, (p.chosen, p.rejected)) for i, p in enumerate(pairs, 1)]
        samples, n = _left(samples, held, data.preferences)
        sources.append(TrainingData("preferences", data.preferences, samples, recipe.train_rm.max_length, held_out=n))
    if data.prompts is None:
        asked = rl_prompts(recipe, task)
    else:
        asked = read_prompts(data.prompts, system, data.columns.prompts)
    samples, n = [Sample(p.item.id if p.item else f"row {i}", p.messages) for i, p in enumerate(asked, 1)], 0
    if data.prompts is not None:
        samples, n = _left(samples, held, data.prompts)
    room = longest_response(recipe)
    sources.append(TrainingData("prompts", data.prompts or of_task, samples, recipe.rl.max_length, room, n))
    return sources


def _shown(at: str, d: Demonstration) -> Sample:
    return Sample(at, d.messages, (d.response,))


def _left(samples: list[Sample], held: frozenset[str], file: str) -> tuple[list[Sample], int]:
    """Those that are not held out, and how many are."""
    left = without_held_out(samples, held, file)
    return left, len(samples) - len(left)


def report(source: TrainingData, chat: ChatFormat | None) -> Report:
    """Lengths are in tokens, or in characters of the bare turns without ``chat``; ``over_window`` counts rows that
    training leaves out, ``silent`` responses without a word; ``example`` has the trained text in ⟦ ⟧.

    Raises ModelError where the template refuses a conversation.
    """
    samples = source.samples
    if chat is None:
        texts = ["".join(f"{m['content']}\n\n" for m in s.messages) for s in samples]
        prompts, responses = [len(text) for text in texts], [[len(text) for text in s.responses] for s in samples]
    else:
        texts = [chat.prompt_text(s.messages) for s in samples]
        prompts = [len(chat.ids(text)) for text in texts]
        responses = [[len(chat.answer(s.messages, text)) for text in s.responses] for s in samples]
    whole = [p + max(r, default=source.room) for p, r in zip(prompts, responses, strict=True)]
    example = texts[0]
    if samples[0].responses:
        trained = samples[0].responses[0]
        if chat is not None:
            trained = chat.answer_text(samples[0].messages, trained) + chat.tokenizer.convert_ids_to_tokens(chat.end)
        example += f"⟦{trained}⟧"
    asked = [tuple(normalised(m["content"]) for m in s.messages) for s in samples]
    answered = [tuple(map(normalised, s.responses)) for s in samples]
    return {
        "use": source.use,
        "source": source.name,
        "rows": len(samples),
        "held_out": source.held_out,
        "unit": "characters" if chat is None else "tokens",
        "prompt": lengths(prompts),
        "response": lengths([n for sizes in responses for n in sizes]) if any(responses) else None,
        "duplicates": len(samples) - len(set(zip(asked, answered, strict=True))),
        "same_pairs": sum(len(texts) == 2 and texts[0] == texts[1] for texts in answered),
        "silent": sum(not text for texts in answered for text in texts),
        "window": source.window,
        "over_window": None if chat is None else sum(n > source.window for n in whole),
        "example": example,
    }


def lengths(sizes: Sequence[int]) -> dict[str, int]:
    ordered, last = sorted(sizes), len(sizes) - 1
    return {"least": ordered[0], "median": ordered[last // 2], "p95": ordered[round(last * 0.95)], "most": ordered[-1]}


def overlap_report(source: TrainingData, items: EvaluationItems, allow: Sequence[str]) -> Report:
    """Rows that are items of one task (``same``) or near twins of them; ``items`` is how many of the ``checked`` ones
    they touch; ``examples`` are (place of the row, overlap).

    ``allowed`` is held against ``data.allow_overlap``: TASK allows near twins, TASK:same the same problems.
    """
    overlaps = items.overlaps([s.messages[-1]["content"] for s in source.samples])
    same, name = sum(o.same for o in overlaps), items.task.name
    likest = sorted(overlaps, key=lambda o: (not o.same, -o.share))[:TOLD]
    return {
        "use": source.use,
        "task": name,
        "checked": len(items),
        "same": same,
        "twins": len(overlaps) - same,
        "items": len({o.item for o in overlaps}),
        "allowed": f"{name}:same" in allow or (same == 0 and (not overlaps or name in allow)),
        "examples": [(source.samples[o.row].at, asdict(o)) for o in likest],
    }


def show(console: Console, reports: Sequence[Report], overlaps: Sequence[Report], notes: Sequence[str]) -> None:
    for r in reports:
        console.stage(r["use"], f"{r['source']}: {r['rows']:,} rows")
        for part in ("prompt", "response"):
            if n := r[part]:
                spread = f"{n['least']:,} to {n['most']:,} {r['unit']}, median {n['median']:,}"
                console.note(f"  {part:<12} {spread}, 95 % within {n['p95']:,}")
        if r["over_window"] is not None:
            whole = "" if r["response"] else " with room for the response"
            console.note(f"  left out     {r['over_window']:,} longer than {r['window']:,} tokens{whole}")
        if r["held_out"]:
            console.note(f"  held out     {r['held_out']:,} rows more, on whose prompts nothing is trained")
        console.note(f"  duplicates   {r['duplicates']:,}")
        if r["use"] == "preferences":
            console.note(f"  no contrast  {r['same_pairs']:,} with chosen the same as rejected")
        if r["silent"]:
            console.note(f"  empty        {r['silent']:,} responses without a word")
        example = r["example"]
        if len(example) > EXAMPLE:
            example = f"{example[: EXAMPLE // 2]} … {example[-EXAMPLE // 2 :]}"
        console.note("\n".join(f"  │ {line}" for line in example.splitlines()))
    if overlaps:
        columns = ("rows of", "task", "same", "twins", "of items", "")
        cells = []
        for o in overlaps:
            verdict = "" if not o["items"] else "allowed" if o["allowed"] else "refused"
            touched = f"{o['items']:,} of {o['checked']:,}"
            cells.append((o["use"], o["task"], o["same"], o["twins"], touched, verdict))
        console.table("overlap with evaluation items", columns, cells)
    for o in overlaps:
        for at, twin in o["examples"]:
            like = "the same as" if twin["same"] else f"{twin['share']:.0%} of the words of"
            console.note(f"  {o['use']}, {at}: {like} {twin['item']}: {' '.join(twin['text'].split())[:100]}")
    for note in notes:
        console.note(f"note: {note}")


def _refusal(o: Report) -> str:
    allow = f"{o['task']}:same" if o["same"] else o["task"]
    return (
        f"{o['use']}: {o['same']:,} rows are evaluation items of {o['task']} and {o['twins']:,} are near twins of them:"
        f" a score on those says little. Take the rows out, or allow it by name: data.allow_overlap: [{allow}]"
    )
