"""What a task is: prompts, gold answers, a grader. One definition of "correct" for rewards and benchmarks alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from lco_lite.errors import DataError, UsageError
from lco_lite.grading import Grade, Item
from lco_lite.grading.math import explain
from lco_lite.tasks.source import Rows


class Task(Protocol):
    """A benchmark and a source of problems: ``train`` (demonstrations, pairs, RL prompts) and ``test`` (held out).

    Every task here is a dataclass, so that ``dataclasses.replace(task, system=...)`` overrides its texts and limits.
    """

    name: str
    template: str
    system: str | None
    max_new_tokens: int

    def items(self, split: str) -> Sequence[Item]:
        """All items of a split in a fixed order. Raises DataError naming the file or hub id wanted if it is absent."""
        ...

    def grade(self, response: str, item: Item) -> Grade:
        """Is this response right? Never raises on whatever the model wrote."""
        ...

    def first_error(self, response: str, item: Item) -> int | None:
        """Index of the first wrong character; None if the response is right or the task cannot tell."""
        ...


def grades(task: Task) -> bool:
    """Whether the task says of a response that it is right or wrong; one with ``aggregate`` makes its own metrics."""
    return not hasattr(task, "aggregate")


BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class Problem(NamedTuple):
    """What a task takes from a row."""

    text: str
    gold: str
    demonstration: str | None = None


Read: TypeAlias = Callable[[Mapping[str, Any]], Problem | None]


def grade_math(response: str, item: Item) -> Grade:
    """The grader of mathematics (``lco_lite.grading.math``)."""
    return explain(response, item.gold)


@dataclass
class Benchmark:
    """``splits`` load the rows (see ``source.splits``), ``read`` makes problems of them.

    ``read`` returns None for a row to leave out; it raises KeyError or ValueError for one that is malformed.
    """

    name: str
    splits: Mapping[str, Callable[[], Rows]]
    read: Read
    grader: Callable[[str, Item], Grade] = grade_math
    template: str = BOXED
    system: str | None = None
    max_new_tokens: int = 1_536
    likelihood_template: str | None = None  # in place of ``template`` where choices are scored by log-likelihood
    _items: dict[str, tuple[Item, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def items(self, split: str) -> Sequence[Item]:
        """All items of a split. Raises UsageError for an unknown split, DataError for absent or malformed data."""
        if split not in self.splits:
            raise UsageError(f"task {self.name} has the splits {', '.join(self.splits)}; {split!r} is none of them")
        if split not in self._items:
            found = enumerate(self.splits[split]())
            items = [self._item(split, i, at, row) for i, (at, row) in found]
            self._items[split] = tuple(item for item in items if item is not None)
        return self._items[split]

    def grade(self, response: str, item: Item) -> Grade:
        """The grader's verdict."""
        return self.grader(response, item)

    def first_error(self, response: str, item: Item) -> int | None:
        """None: where free text goes wrong is not for a rule to tell."""
        return None

    def _item(self, split: str, i: int, at: str, row: dict[str, Any]) -> Item | None:
        try:
            problem = self.read(row)
        except KeyError as e:
            raise DataError(f"{at}: has no field {e.args[0]!r}; found {', '.join(row) or 'none'}") from e
        except ValueError as e:
            raise DataError(f"{at}: {e}") from e
        if problem is None:
            return None
        prompt = self.template.replace("{problem}", problem.text)
        shown = None if split == "test" else problem.demonstration  # what is held out is never imitated
        return Item(f"{self.name}/{split}/{i}", prompt, problem.gold, shown, row)


def text(row: Mapping[str, Any], *names: str) -> str:
    """The first field of ``names`` that the row has, as text that is not empty. Raises KeyError or ValueError."""
    name = next((n for n in names if n in row), None)
    if name is None:
        raise KeyError(" or ".join(names))
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"field {name} is {row[name]!r:.60}, not a text")
    return row[name].strip()


def answer_text(row: Mapping[str, Any], name: str = "answer") -> str:
    """An answer that is a text or a number, as text: 27.0 becomes 27. Raises KeyError or ValueError."""
    value = row[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value)) if value == int(value) else repr(value)
    return text(row, name)
