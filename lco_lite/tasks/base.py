"""What a task is: problems, a prompt around each of them, a grader; and where the rows of its splits come from."""

import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from lco_lite.console import Console
from lco_lite.errors import DataError, UsageError
from lco_lite.files import is_there, read_jsonl
from lco_lite.grading import Grade, Grader, Item
from lco_lite.grading.choice import LETTERS
from lco_lite.grading.math import MathGrader
from lco_lite.messages import Message, conversation
from lco_lite.recipe import Eval
from lco_lite.tables import names_in, refuse_local

FOLDER = "LCO_LITE_DATA"
BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

Rows: TypeAlias = list[tuple[str, dict[str, Any]]]
"""Rows, each with its place for messages: ``FILE, line 3``."""


class Problem(NamedTuple):
    """What a task takes from a row. Without an ``id`` of its own, an item is named by its split and place; ``row`` is
    the row where the task corrects it; ``messages`` the conversation whose last turn ``text`` is."""

    text: str
    gold: str
    demonstration: str | None = None
    id: str | None = None
    row: Mapping[str, Any] | None = None
    messages: Sequence[Message] | None = None


@dataclass
class Task:
    """A benchmark and a source of problems: ``train`` (demonstrations, pairs, RL prompts) and ``test`` (held out).

    ``sources`` load the rows of each split, given the folder to look in (see ``Source``). ``read`` makes a problem of a
    row: None leaves the row out, KeyError and ValueError say that it is malformed. ``data`` is a file with the ``test``
    rows, or the folder; without one ``LCO_LITE_DATA`` names the folder. ``template`` stands around the problem (see
    ``fill``), ``likelihood_template`` where choices are scored by log-likelihood. Without a ``grader`` a response is
    neither right nor wrong, and ``aggregate`` scores.
    ``dataclasses.replace(task, system=...)`` gives the same task with another text, limit or grader.
    """

    name: str
    sources: Mapping[str, Callable[[Path | None], Rows]]
    read: Callable[[Mapping[str, Any]], Problem | None]
    data: Path | None = None
    grader: Grader | None = MathGrader()
    template: str = BOXED
    likelihood_template: str | None = None
    system: str | None = None
    max_new_tokens: int = 1_536
    _items: dict[str, tuple[Item, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def items(self, split: str) -> Sequence[Item]:
        """All items of a split in a fixed order. Raises UsageError for an unknown split, DataError for absent (the
        message names the file or hub set that is wanted) or malformed data."""
        if split not in self.sources:
            raise UsageError(f"task {self.name} has the splits {', '.join(self.sources)}; {split!r} is none of them")
        if split not in self._items:
            items = [self._item(split, i, place, row) for i, (place, row) in enumerate(self._rows(split))]
            self._items[split] = tuple(item for item in items if item is not None)
        return self._items[split]

    @property
    def graded(self) -> bool:
        """Whether the task says of a response that it is right or wrong."""
        return self.grader is not None

    def grade(self, response: str, item: Item) -> Grade:
        """Is this response right? Never raises, whatever the model wrote."""
        return self.grader(response, item) if self.grader else Grade(False, None, "scored by aggregate")

    @property
    def places_errors(self) -> bool:
        """Whether the task has a ``first_error`` of its own."""
        return type(self).first_error is not Task.first_error

    def first_error(self, response: str, item: Item) -> int | None:
        """Index of the first wrong character; None where the response is right or the task cannot tell."""
        return None

    def check(self, settings: Eval, n: int, passes: int, console: Console) -> None:
        """Before any response: raises UsageError where scoring ``n`` of them, ``passes`` times, lacks something."""

    def scored_by(self, settings: Eval) -> dict[str, Any]:
        """The settings that ``aggregate`` rests on, beside the responses; JSON."""
        return {}

    def aggregate(self, rows: list[dict[str, Any]], settings: Eval, folder: Path, console: Console) -> dict[str, Any]:
        """Metrics of one pass, the main one first, where responses are not graded. ``rows`` have ``id``, ``response``
        and the data ``row``; files of the task's own go to ``folder``.

        A metric is a number; or one a row (None: a row without), whose mean is shown with its standard error, and by
        which scores are compared; or None, where it cannot be had this time: the same command tries again.
        """
        raise NotImplementedError(f"task {self.name} is graded: it has no other metrics")

    def _rows(self, split: str) -> Rows:
        if self.data is not None and self.data.is_dir():
            return self.sources[split](self.data)
        if self.data is not None and split == "test":
            return read_rows(self.data)
        return self.sources[split](Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None)

    def _item(self, split: str, i: int, place: str, row: dict[str, Any]) -> Item | None:
        try:
            problem = self.read(row)
            if problem is None:
                return None
            prompt = fill(self.template, row, problem.text)
        except KeyError as e:
            raise DataError(f"{place}: has no field {e.args[0]!r}; found {names_in(row)}") from e
        except ValueError as e:
            raise DataError(f"{place}: {e}") from e
        shown = None if split == "test" else problem.demonstration  # what is held out is never imitated
        messages = problem.messages and [*problem.messages[:-1], {"role": "user", "content": prompt}]
        return Item(problem.id or f"{self.name}/{split}/{i}", prompt, problem.gold, shown, problem.row or row, messages)


def asked(item: Item, system: str | None = None) -> list[Message]:
    """The conversation that ends with the item's turn, after ``system`` where it has no system message of its own."""
    if item.messages is None:
        return [*conversation(item.prompt, system)]
    has_own = item.messages[0]["role"] == "system"
    return [*([{"role": "system", "content": system}] if system and not has_own else []), *item.messages]


def fill(template: str, row: Mapping[str, Any], problem: str | None = None) -> str:
    """``template`` with ``{problem}``, and of the row ``{question}``, ``{choices}`` (lines ``A. …``) and ``{subject}``
    (in words). Other braces are LaTeX. Raises KeyError or ValueError where the row does not have what is named."""

    def value(field: re.Match[str]) -> str:
        if field[1] == "problem":
            return field[0] if problem is None else problem
        if field[1] == "choices":
            return lettered(row["choices"])
        found = text(row, field[1])
        return found.replace("_", " ") if field[1] == "subject" else found

    return re.sub(r"\{(problem|question|choices|subject)\}", value, template)


def lettered(choices: Any) -> str:
    """Raises ValueError unless these are some texts or numbers, and not more than there are letters."""
    known = isinstance(choices, (list, tuple)) and all(isinstance(one, (str, int, float)) for one in choices)
    if not known or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"field choices is {choices!r:.60}, not a list of 2 to {len(LETTERS)} texts")
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def text(row: Mapping[str, Any], *names: str) -> str:
    """The first field of ``names`` that the row has, as text that is not empty. Raises KeyError or ValueError."""
    name = next((n for n in names if n in row), None)
    if name is None:
        raise KeyError(" or ".join(names))
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"field {name} is {row[name]!r:.60}, not a text")
    return row[name].strip()


def answer_text(row: Mapping[str, Any]) -> str:
    """The field ``answer``, a text or a number, as text: 27.0 becomes 27. Raises KeyError or ValueError."""
    value = row["answer"]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"field answer is {value!r}, no number")
        return str(int(value)) if value == int(value) else repr(value)
    return text(row, "answer")


EVERY_CONFIG = "*"


@dataclass(frozen=True)
class Source:
    """The rows of one split: ``files`` of the folder, one after the other; without them ``split`` of the hub set
    ``hub``. With ``EVERY_CONFIG`` each row has its configuration's name as ``subject``."""

    files: tuple[str, ...]
    hub: str
    split: str
    config: str | None = None

    def __call__(self, folder: Path | None) -> Rows:
        """Raises DataError where neither has the rows."""
        if folder is not None and all(is_there(folder / name) for name in self.files):
            return read_rows(*(folder / name for name in self.files))
        refuse_local(self.hub)
        import datasets

        every = self.config == EVERY_CONFIG
        try:
            rows = [
                {"subject": config, **row} if every else dict(row)
                for config in (datasets.get_dataset_config_names(self.hub) if every else [self.config])
                for row in datasets.load_dataset(self.hub, config, split=self.split)
            ]
        except Exception as e:  # offline, renamed, gated, a broken cache: many kinds, one meaning
            files = " and ".join(self.files)
            where = f"the folder {str(folder):.200} has no {files}, and the" if folder else "the"
            raise hub_error(f"{where} hub set {self.hub} (split {self.split})", files, e) from e
        return [(f"{self.hub}, row {i}", row) for i, row in enumerate(rows, 1)]


def hub_error(what: str, files: str, cause: Exception) -> DataError:
    """The hub did not give ``what``; ``files`` of a folder would do."""
    first = next(iter(str(cause).splitlines()), "") or type(cause).__name__
    local = f"To use local data, set {FOLDER}=DIR to a folder with {files}"
    return DataError(f"{what} cannot be loaded: {first[:200]}. {local}")


def read_rows(*files: Path) -> Rows:
    """The rows of one JSONL file after the other. Raises DataError naming file and line of what is wrong."""
    return [(f"{file}, line {i}", row) for file in files for i, row in enumerate(read_jsonl(file), 1)]


def first_file(folder: Path | None, names: Sequence[str]) -> Path | None:
    """The first of these files that the folder has."""
    return next((folder / name for name in names if folder and is_there(folder / name)), None)


def normalised(text: str) -> str:
    """Prompts that differ in case, spacing and Unicode form alone are the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 200


def drawn_to_hold_out(prompts: Iterable[str], share: float | None, seed: int) -> frozenset[str]:
    """Of the prompts, normalised and each once, those that nothing is trained on: this share of them, or a tenth and
    at most 200. Each one's place in the draw depends on the seed and its text alone, in whatever file it stands."""
    known = {normalised(prompt) for prompt in prompts}
    n = min(round(HELD_OUT_SHARE * len(known)), HELD_OUT_MOST) if share is None else round(share * len(known))
    order = sorted(known, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    return frozenset(order[: min(n, len(known) - 1)])
