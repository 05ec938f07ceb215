"""Which training prompts are evaluation items: the same text, or so many of the same 13 words in a row.

Two texts are the same if they differ in case, spacing and Unicode form alone: in mathematics every sign counts. A word
is what stands between spaces, less the punctuation around it. n = 13 is GPT-3's (Brown et al. 2020, appendix C). One
shared run of 13 words may be a turn of phrase ("Find the number of ordered pairs …"), so what is called an overlap
shares half of the item's words in such runs, as Tülu 3 has it (Lambert et al. 2024, section 3.2); items shorter than 13
words overlap by the same text only. What a task writes around every problem does not count.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lco_lite.errors import DataError
from lco_lite.tasks.base import Task, normalised

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


class EvaluationItems:
    """The held-out items of one task, indexed for ``same`` and ``overlaps``. Raises DataError where it has none."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._same: dict[str, str] = {}  # text -> item
        self._length: dict[str, int] = {}  # item -> words
        self._runs: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)  # 13 words -> (item, place)
        for item in task.items("test"):
            text = self._problem(item.prompt)
            self._same.setdefault(text, item.id)
            self._length[item.id] = len(_words(text))
            for place, run in _runs(text):
                self._runs[run].append((item.id, place))

    def __len__(self) -> int:
        return len(self._length)

    def same(self, prompts: Sequence[str]) -> list[Overlap]:
        """Those with the same text as an item."""
        items = (self._same.get(self._problem(prompt)) for prompt in prompts)
        return [Overlap(i, item, True, 1.0, prompts[i]) for i, item in enumerate(items) if item is not None]

    def overlaps(self, prompts: Sequence[str]) -> list[Overlap]:
        """Those that share at least half of an item's words in runs of 13, or its whole text; the likest item each."""
        overlaps = {overlap.row: overlap for overlap in self.same(prompts)}
        for i, prompt in enumerate(prompts):
            if i not in overlaps:
                share, item = max(self._shares(prompt), default=(0.0, ""))
                if share >= SHARE:
                    overlaps[i] = Overlap(i, item, False, share, prompt)
        return [overlaps[i] for i in sorted(overlaps)]

    def _shares(self, prompt: str) -> Iterator[tuple[float, str]]:
        covered: dict[str, set[int]] = defaultdict(set)
        for _, run in _runs(self._problem(prompt)):
            for item, place in self._runs.get(run, ()):
                covered[item].update(range(place, place + N))
        return ((len(places) / self._length[item], item) for item, places in covered.items())

    def _problem(self, text: str) -> str:
        """``text``, normalised, without the task's template where it is written in it."""
        before, _, after = self.task.template.partition("{problem}")
        if text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)]
        return normalised(text)


def _words(text: str) -> list[str]:
    return [word for word in (part.strip(_PUNCTUATION) for part in text.split()) if word]


def _runs(text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    words = _words(text)
    return ((place, tuple(words[place : place + N])) for place in range(len(words) - N + 1))


def refuse_same(prompts: Sequence[str], task: Task, allowed: Sequence[str], source: str) -> None:
    """Raises DataError where prompts to train on are held-out items of ``task``, unless ``allowed`` has TASK:same."""
    if f"{task.name}:same" in allowed:
        return
    overlaps = EvaluationItems(task).same(prompts)
    if overlaps:
        first = overlaps[0]
        raise DataError(
            f"{source}: {len(overlaps)} of its {len(prompts)} prompts are held-out items of {task.name}, e.g. "
            f"{first.text!r:.80} ({first.item}): a score on them says nothing. Take them out, or allow it by name: "
            f"data.allow_overlap: [{task.name}:same]"
        )
