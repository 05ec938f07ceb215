"""Two-digit sums and differences with the working written out from the right, each a task.

``arithmetic``: ``47+38`` -> ``7+8+0=15 4+3+1=8 #85``. ``subtraction``: ``82-45`` -> ``12-5-0=7 8-4-1=3 #37``. A direct
answer is too hard for a very small model; with the working each token follows from a few others. No test problem occurs
in ``train``, not even with its summands swapped.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice, product
from os.path import commonprefix
from pathlib import Path
from typing import Any

from lco_lite.errors import UsageError
from lco_lite.grading import Grade, Item
from lco_lite.tasks.base import Problem, Rows, Task

TRAIN, TEST = 5_000, 1_000  # of differences there are 4,095 in all
_SEED = 20_260_300
_LONGEST = 32  # tokens: the longest response is 23 bytes, and its end-of-sequence token
_TWO_DIGITS = range(10, 100)


class Arithmetic(Task):
    """Knows where a response first goes wrong, for there is one right working."""

    def first_error(self, response: str, item: Item) -> int | None:
        """Where the response departs from the working (its length if it stops too early); None if it is right."""
        problem, response = self.read(item.row), response.rstrip()
        right = (problem and problem.demonstration) or ""
        return None if response == right else len(commonprefix([response, right]))


def arithmetic(data: Path | None = None) -> Task:
    """``train``: 5,000 problems with demonstrations; ``test``: 1,000 held out. Each split in a fixed random order."""
    return _made("arithmetic", _sums, _read_sum, data)


def subtraction(data: Path | None = None) -> Task:
    """No difference is negative. ``train``: 3,095 problems with demonstrations; ``test``: 1,000 held out."""
    return _made("subtraction", _differences, _read_difference, data)


def _made(
    name: str, rows: Callable[..., Rows], read: Callable[[Mapping[str, Any]], Problem], data: Path | None
) -> Task:
    if data is not None:
        raise UsageError(f"task {name} makes its own problems and reads no data; {data} is not used")
    sources = {split: partial(rows, split) for split in ("train", "test")}
    return Arithmetic(name, sources, read, grader=grade_sum, template="{problem}", max_new_tokens=_LONGEST)


def grade_sum(response: str, item: Item) -> Grade:
    """Exact match of what stands after the last ``#``."""
    _, mark, answer = response.rpartition("#")
    if not mark:
        return Grade(False, None, "no # in the response")
    answer = answer.strip()
    right = answer == item.gold
    return Grade(right, answer, "equal" if right else f"{answer[:20]!r} is not {item.gold}")


def working(a: int, b: int) -> str:
    """The response to ``a+b``: one sum a column, units first, the carry as third summand, then ``#`` and the answer."""
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}+0={units} {a // 10}+{b // 10}+{carry}={tens} #{a + b}"


def borrowing(a: int, b: int) -> str:
    """The response to ``a-b``, a ≥ b: one difference a column, units first. Units too few take ten from the tens, which
    is the third number of that column; then ``#`` and the answer."""
    borrow = int(a % 10 < b % 10)
    units, tens = a % 10 + 10 * borrow, a // 10
    return f"{units}-{b % 10}-0={units - b % 10} {tens}-{b // 10}-{borrow}={tens - b // 10 - borrow} #{a - b}"


def _read_sum(row: Mapping[str, Any]) -> Problem:
    a, b = row["a"], row["b"]
    return Problem(f"{a}+{b}", str(a + b), working(a, b), f"arithmetic/{a}+{b}")


def _read_difference(row: Mapping[str, Any]) -> Problem:
    a, b = row["a"], row["b"]
    return Problem(f"{a}-{b}", str(a - b), borrowing(a, b), f"subtraction/{a}-{b}")


def _sums(split: str, folder: Path | None) -> Rows:
    pairs = _in_random_order(product(_TWO_DIGITS, _TWO_DIGITS))
    by_summands: dict[frozenset[int], tuple[int, int]] = {}
    for pair in pairs:
        by_summands.setdefault(frozenset(pair), pair)
    test = dict(islice(by_summands.items(), TEST))
    chosen = test.values() if split == "test" else [pair for pair in pairs if frozenset(pair) not in test][:TRAIN]
    return [(f"{a}+{b}", {"a": a, "b": b}) for a, b in chosen]


def _differences(split: str, folder: Path | None) -> Rows:
    pairs = _in_random_order((a, b) for a in _TWO_DIGITS for b in _TWO_DIGITS if a >= b)
    return [(f"{a}-{b}", {"a": a, "b": b}) for a, b in (pairs[:TEST] if split == "test" else pairs[TEST:])]


def _in_random_order(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    # random() is the one method whose sequence Python promises to keep for ever, hence sorting by it, not shuffle().
    rng = random.Random(_SEED)
    return sorted(pairs, key=lambda _: rng.random())


TASKS = {"arithmetic": arithmetic, "subtraction": subtraction}
