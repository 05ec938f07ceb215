"""What training data looks like: rows, lengths, duplicates, rows that do not fit, evaluation items among them.

Pure functions from rows to a report; ``stages/data_check.py`` opens a recipe's data for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lco_lite.console import Console
from lco_lite.data import prompts as prepared
from lco_lite.data import rows
from lco_lite.data.overlap import EvaluationItems, Overlap, normalised
from lco_lite.errors import DataError, ModelError
from lco_lite.models.chat import ChatFormat, Message
from lco_lite.models.loading import open_tokenizer
from lco_lite.recipe import Recipe
from lco_lite.tasks import load_task
from lco_lite.tasks.base import Task

SHOWN = 5  # overlapping rows that are told one by one, the likest first


@dataclass(frozen=True)
class Sample:
    """A conversation and the responses that are trained on; two of them (chosen, rejected) make a pair. ``at`` is its
    place: ``row 17``, or the id of a task's item."""

    at: str
    messages: Sequence[Message]
    responses: Sequence[str] = ()

    @property
    def asked(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Lengths:
    least: int
    median: int
    p95: int
    most: int


@dataclass(frozen=True)
class SourceReport:
    """One source of rows. Lengths are in tokens, or in characters where there is no tokenizer; ``over_window`` counts
    rows longer than ``window`` tokens, which training leaves out; ``example`` has the trained text in ⟦ ⟧."""

    use: str
    source: str
    rows: int
    unit: str
    prompt: Lengths
    response: Lengths | None
    duplicates: int
    same_pairs: int
    silent: int
    window: int
    over_window: int | None
    example: str


@dataclass(frozen=True)
class OverlapReport:
    """Rows of one source that are items of one task (``same``) or near twins of them. ``items`` is how many of the
    ``checked`` ones they touch; ``examples`` are (place of the row, overlap)."""

    use: str
    task: str
    checked: int
    same: int
    twins: int
    items: int
    allowed: bool
    examples: Sequence[tuple[str, Overlap]]


def report(
    use: str, source: str, samples: Sequence[Sample], chat: ChatFormat | None, window: int, room: int = 0
) -> SourceReport:
    """``room``: tokens that a response may take where it is yet to be sampled. Raises ModelError where the template
    refuses a conversation."""
    write: Callable[[Sample], str] = chat_text(chat)
    prompts = [_size(chat, write(s), prompt=True) for s in samples]
    responses = [[_size(chat, text, prompt=False) for text in s.responses] for s in samples]
    whole = [p + max(r, default=room) for p, r in zip(prompts, responses, strict=True)]
    first = samples[0]
    shown = first.responses[0] if first.responses else ""
    return SourceReport(
        use,
        source,
        len(samples),
        "characters" if chat is None else "tokens",
        lengths(prompts),
        lengths([n for sizes in responses for n in sizes]) if any(responses) else None,
        len(samples) - len({_key(s) for s in samples}),
        sum(len(s.responses) == 2 and normalised(s.responses[0]) == normalised(s.responses[1]) for s in samples),
        sum(not text.strip() for s in samples for text in s.responses),
        window,
        None if chat is None else sum(n > window for n in whole),
        write(first) + (f"⟦{shown}{_end(chat)}⟧" if first.responses else ""),
    )


def overlap_report(
    use: str, samples: Sequence[Sample], items: EvaluationItems, allowed: Sequence[str]
) -> OverlapReport:
    """Held against ``data.allow_overlap``: TASK allows near twins, TASK:same the same problems."""
    found = items.overlaps([s.asked for s in samples])
    same = sum(o.same for o in found)
    name = items.task.name
    fine = f"{name}:same" in allowed or (same == 0 and (not found or name in allowed))
    likest = sorted(found, key=lambda o: (not o.same, -o.share))[:SHOWN]
    examples = [(samples[o.row].at, o) for o in likest]
    return OverlapReport(use, name, len(items), same, len(found) - same, len({o.item for o in found}), fine, examples)


def lengths(sizes: Sequence[int]) -> Lengths:
    ordered = sorted(sizes)
    last = len(ordered) - 1
    return Lengths(ordered[0], ordered[last // 2], ordered[round(last * 0.95)], ordered[last])


def chat_text(chat: ChatFormat | None) -> Callable[[Sample], str]:
    """The prompt as the model sees it; without a tokenizer the bare turns."""
    if chat is not None:
        return lambda sample: chat.prompt_text(sample.messages)
    return lambda sample: "\n\n".join(m["content"] for m in sample.messages) + "\n\n"


def _size(chat: ChatFormat | None, text: str, prompt: bool) -> int:
    if chat is None:
        return len(text)
    return len(chat.ids(text)) + (0 if prompt else 1)  # and the token that ends a response


def _end(chat: ChatFormat | None) -> str:
    return "" if chat is None else str(chat.tokenizer.convert_ids_to_tokens(chat.end))


def _key(sample: Sample) -> tuple[str, ...]:
    return (*(normalised(m["content"]) for m in sample.messages), "", *map(normalised, sample.responses))


Sources = list[tuple[str, str, list[Sample], int, int]]
"""(use, source, samples, window, room of a response to be sampled)"""


def check_data(recipe: Recipe, console: Console, json: bool) -> None:
    """Prints the report. Raises DataError where evaluation items are trained on and not allowed by name."""
    task = prepared.recipe_task(recipe)
    sources = _sources(recipe, task)
    chat, missing = _chat(recipe)
    reports = [report(use, source, samples, chat, window, room) for use, source, samples, window, room in sources]
    overlaps, unchecked = _overlaps(recipe, sources)
    notes = [*missing, *unchecked]
    if recipe.rl.needs_reward_model and recipe.data.preferences == "sampled":
        notes.append("preferences: sampled from the policy later, on the prompts below")
    if json:
        found = {"sources": [asdict(r) for r in reports], "overlaps": [asdict(o) for o in overlaps], "notes": notes}
        console.emit(found)
    else:
        _tell(console, reports, overlaps, notes)
    refused = [o for o in overlaps if not o.allowed]
    if refused:
        raise DataError("; ".join(map(_refusal, refused)))


def _sources(recipe: Recipe, task: Task | None) -> Sources:
    """Rows in the order of their file, all of them, and of the task what each stage will take."""
    data, rl, system = recipe.data, recipe.rl, prepared.system_text(recipe, task)
    found: Sources = []
    if recipe.sft.enabled:
        samples = _demonstrations(recipe, task, system)
        found.append(("demonstrations", data.demonstrations or _of(task), samples, recipe.sft.max_length, 0))
    if rl.needs_reward_model and data.preferences != "sampled":
        pairs = rows.preferences(data.preferences, system, data.columns.preferences)
        samples = [Sample(f"pair {i}", p.messages, (p.chosen, p.rejected)) for i, p in enumerate(pairs, 1)]
        found.append(("preferences", data.preferences, samples, recipe.train_rm.max_length, 0))
    room = rl.max_new_tokens or (task.max_new_tokens if task else rl.max_length // 2)
    found.append(("prompts", data.prompts or _of(task), _prompts(recipe, task, system), rl.max_length, room))
    return found


def _demonstrations(recipe: Recipe, task: Task | None, system: str | None) -> list[Sample]:
    data = recipe.data
    if data.demonstrations is None:
        taken = prepared.demonstrations(recipe, task)
        return [Sample(f"item {i}", d.messages, (d.response,)) for i, d in enumerate(taken, 1)]
    shown = rows.demonstrations(data.demonstrations, system, data.columns.demonstrations)
    return [Sample(f"row {i}", d.messages, (d.response,)) for i, d in enumerate(shown, 1)]


def _prompts(recipe: Recipe, task: Task | None, system: str | None) -> list[Sample]:
    data = recipe.data
    if data.prompts is None:
        return [Sample(p.item.id if p.item else "", p.messages) for p in prepared.rl_prompts(recipe, task)]
    asked = rows.prompts(data.prompts, system, data.columns.prompts)
    return [Sample(f"row {i}", messages) for i, (messages, _) in enumerate(asked, 1)]


def _of(task: Task | None) -> str:
    return f"training items of {task.name}" if task else ""


def _chat(recipe: Recipe) -> tuple[ChatFormat | None, list[str]]:
    try:
        return ChatFormat(open_tokenizer(recipe.model, recipe.seed), recipe.chat.template_args), []
    except ModelError as e:
        return None, [f"no tokenizer, so lengths are in characters and no template is applied: {e}"]


def _overlaps(recipe: Recipe, sources: Sources) -> tuple[list[OverlapReport], list[str]]:
    """Every source against the held-out items of every task that the recipe scores; what could not be had is noted."""
    found, notes = [], []
    for name in dict.fromkeys([*([recipe.task] if recipe.task else []), *(recipe.eval.tasks or [])]):
        task = load_task(name, recipe.data.task if name == recipe.task else None)
        try:
            items = EvaluationItems(task)
        except DataError as e:
            notes.append(f"overlap with {name} is not checked: {e}")
            continue
        for use, _, samples, _, _ in sources:
            found.append(overlap_report(use, samples, items, recipe.data.allow_overlap))
    return found, notes


def _tell(
    console: Console, reports: Sequence[SourceReport], overlaps: Sequence[OverlapReport], notes: Sequence[str]
) -> None:
    for r in reports:
        console.stage(r.use, f"{r.source}: {r.rows:,} rows")
        console.note(f"  prompt       {_spread(r.prompt, r.unit)}")
        if r.response is not None:
            console.note(f"  response     {_spread(r.response, r.unit)}")
        if r.over_window is not None:
            whole = "" if r.response is not None else " with room for the response"
            console.note(f"  left out     {r.over_window:,} longer than {r.window:,} tokens{whole}")
        console.note(f"  duplicates   {r.duplicates:,}")
        if r.use == "preferences":
            console.note(f"  no contrast  {r.same_pairs:,} with chosen the same as rejected")
        if r.silent:
            console.note(f"  empty        {r.silent:,} responses without a word")
        console.note(_indented(r.example))
    if overlaps:
        console.table("overlap with evaluation items", OVERLAP_COLUMNS, [_cells(o) for o in overlaps])
    for o in overlaps:
        for at, twin in o.examples:
            like = "the same as" if twin.same else f"{twin.share:.0%} of the words of"
            console.note(f"  {o.use}, {at}: {like} {twin.item}: {' '.join(twin.text.split())[:100]}")
    for note in notes:
        console.note(f"note: {note}")


OVERLAP_COLUMNS = ("rows of", "task", "same", "twins", "of items", "")


def _cells(o: OverlapReport) -> tuple[Any, ...]:
    verdict = "" if not o.same + o.twins else "allowed" if o.allowed else "refused"
    return o.use, o.task, o.same, o.twins, f"{o.items:,} of {o.checked:,}", verdict


def _refusal(o: OverlapReport) -> str:
    allow = f"{o.task}:same" if o.same else o.task
    return (
        f"{o.use}: {o.same:,} rows are evaluation items of {o.task} and {o.twins:,} their near twins: a score on those "
        f"says little. Take the rows out, or allow it by name: data.allow_overlap: [{allow}]"
    )


def _spread(n: Lengths, unit: str) -> str:
    return f"{n.least:,} to {n.most:,} {unit}, median {n.median:,}, 95 % within {n.p95:,}"


def _indented(text: str, limit: int = 1_200) -> str:
    shown = text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return "\n".join(f"  │ {line}" for line in shown.splitlines())
