"""Is this response right? A problem, the verdict on a response to it, and the graders, a file each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Item:
    """One problem.

    ``prompt`` is the user's turn as plain text; ``gold`` the right answer; ``demonstration`` a full response to
    imitate, where the data has one; ``row`` the data row it came from, for graders and the rows of an evaluation;
    ``messages`` the whole conversation that ends with ``prompt``, where there is more of it.
    """

    id: str
    prompt: str
    gold: str
    demonstration: str | None
    row: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Grade:
    """``right``; what was ``extracted`` from the response (None: nothing found); ``why``, in a few words."""

    right: bool
    extracted: str | None
    why: str


Grader: TypeAlias = Callable[[str, Item], Grade]
