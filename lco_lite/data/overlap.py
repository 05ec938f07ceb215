"""Which training prompts are evaluation items: the same text, or so many of the same 13 words in a row.

Two texts are the same if they differ in case, spacing and Unicode form alone: in mathematics every sign counts. A word
is what stands between spaces, less the punctuation around it. n = 13 is GPT-3's (Brown et al. 2020, appendix C). One
shared run of 13 words may be a turn of phrase ("Find the number of ordered pairs …"), so what is called an overlap
shares half of the item's words in such runs, as Tülu 3 has it (Lambert et al. 2024, section 3.2); items shorter than 13
words overlap by the same text only.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lco_lite.errors import DataError
from lco_lite.tasks.base import Item, Task

N = 13
SHARE = 0.5
_PUNCTUATION = ".,;:!?()[]\"'“”‘’`"


@dataclass(frozen=True)
class Overlap:
    """Training prompt ``row`` (from 0) is the evaluation item ``item``, or has ``share`` of its words in long runs."""

    row: int
    item: str
    same: bool
    share: float
    text: str


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def problem_of(task: Task, item: Item) -> str:
    """The item's prompt without what the task writes around every problem."""
    return bare(item.prompt, task)


def bare(text: str, task: Task | None) -> str:
    """``text`` without the task's template, where it is written in it."""
    before, _, after = (task.template if task else "{problem}").partition("{problem}")
    if text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)]
    return text


class EvaluationItems:
    """The items of one task, indexed for ``same`` and ``overlaps``."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._same: dict[str, str] = {}
        self._words: dict[str, int] = {}
        self._grams: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
        for item in task.items("test"):
            text = normalised(problem_of(task, item))
            self._same.setdefault(text, item.id)
            words = _words(text)
            self._words[item.id] = len(words)
            for at, gram in _grams(words):
                self._grams[gram].append((item.id, at))

    def __len__(self) -> int:
        return len(self._words)

    def same(self, prompts: Sequence[str]) -> list[Overlap]:
        """Those with the same text as an item."""
        found = ((i, self._same.get(normalised(bare(text, self.task))), text) for i, text in enumerate(prompts))
        return [Overlap(i, item, True, 1.0, text) for i, item, text in found if item is not None]

    def overlaps(self, prompts: Sequence[str]) -> list[Overlap]:
        """Those that share at least half of an item's words in runs of 13, or its whole text; the likest item each."""
        found = {o.row: o for o in self.same(prompts)}
        for i, text in enumerate(prompts):
            if i not in found:
                best = max(self._shares(text), default=(0.0, ""))
                if best[0] >= SHARE:
                    found[i] = Overlap(i, best[1], False, best[0], text)
        return [found[i] for i in sorted(found)]

    def _shares(self, text: str) -> Iterator[tuple[float, str]]:
        covered: dict[str, set[int]] = defaultdict(set)
        for _, gram in _grams(_words(normalised(bare(text, self.task)))):
            for item, at in self._grams.get(gram, ()):
                covered[item].update(range(at, at + N))
        return ((len(places) / self._words[item], item) for item, places in covered.items())


def _words(text: str) -> list[str]:
    return [word for word in (part.strip(_PUNCTUATION) for part in text.split()) if word]


def _grams(words: Sequence[str]) -> Iterable[tuple[int, tuple[str, ...]]]:
    return ((at, tuple(words[at : at + N])) for at in range(len(words) - N + 1))


def refuse_same(prompts: Sequence[str], task: Task, allowed: Sequence[str], source: str) -> None:
    """Raises DataError where prompts to train on are held-out items of ``task``, unless ``allowed`` has TASK:same."""
    if f"{task.name}:same" in allowed:
        return
    found = EvaluationItems(task).same(prompts)
    if found:
        first = found[0]
        raise DataError(
            f"{source}: {len(found)} of its {len(prompts)} prompts are held-out items of {task.name}, e.g. "
            f"{first.text!r:.80} ({first.item}): a score on them says nothing. Take them out, or allow it by name: "
            f"data.allow_overlap: [{task.name}:same]"
        )
