"""What a task is: prompts, gold answers, a grader. One definition of "correct" for rewards and benchmarks alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """One problem.

    ``prompt`` is the user's turn as plain text; ``gold`` the right answer; ``demonstration`` a full response to
    imitate, where the data has one; ``row`` the data row it came from, for graders and the rows of an evaluation.
    """

    id: str
    prompt: str
    gold: str
    demonstration: str | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Grade:
    """``right``; what was ``extracted`` from the response (None: nothing found); ``why``, in a few words."""

    right: bool
    extracted: str | None
    why: str


class Task(Protocol):
    """A benchmark and a source of problems: ``train`` (demonstrations, pairs, RL prompts) and ``test`` (held out).

    Every task here is a dataclass, so that ``dataclasses.replace(task, system=...)`` overrides its texts and limits.
    """

    name: str
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
