"""What training data looks like: rows, lengths, duplicates, rows that do not fit, evaluation items among them.

Pure functions from rows to a report; ``stages/data_check.py`` opens a recipe's data for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lco_lite.data.chat import ChatFormat, Message
from lco_lite.data.overlap import EvaluationItems, Overlap, normalised

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
