"""Two-digit addition with the working written out from the right: ``47+38`` -> ``7+8+0=15 4+3+1=8 #85``.

A direct answer is too hard for a very small model; with the working each token follows from a few others. No test
problem occurs in ``train``, not even with its summands swapped.
"""

import random
from collections.abc import Mapping
from functools import partial
from itertools import islice, product
from os.path import commonprefix
from pathlib import Path
from typing import Any

from lco_lite.errors import UsageError
from lco_lite.grading import Grade, Item
from lco_lite.tasks.base import Problem, Rows, Task

TRAIN, TEST = 5_000, 1_000
_SEED = 20_260_300
_LONGEST = 32  # tokens: the longest response is 23 bytes, and its end-of-sequence token


class Arithmetic(Task):
    """Knows where a response first goes wrong, for there is one right working."""

    def first_error(self, response: str, item: Item) -> int | None:
        """Where the response departs from the working (its length if it stops too early); None if it is right."""
        right, response = working(item.row["a"], item.row["b"]), response.rstrip()
        return None if response == right else len(commonprefix([response, right]))


def arithmetic(data: Path | None = None) -> Task:
    """``train``: 5,000 problems with demonstrations; ``test``: 1,000 held out. Each split in a fixed random order."""
    if data is not None:
        raise UsageError(f"task arithmetic makes its own problems and reads no data; {data} is not used")
    sources = {split: partial(_rows, split) for split in ("train", "test")}
    return Arithmetic("arithmetic", sources, _read, grader=grade_sum, template="{problem}", max_new_tokens=_LONGEST)


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


def _read(row: Mapping[str, Any]) -> Problem:
    a, b = row["a"], row["b"]
    return Problem(f"{a}+{b}", str(a + b), working(a, b), f"arithmetic/{a}+{b}")


def _rows(split: str, folder: Path | None) -> Rows:
    # random() is the one method whose sequence Python promises to keep for ever, hence sorting by it, not shuffle().
    rng = random.Random(_SEED)
    pairs = sorted(product(range(10, 100), range(10, 100)), key=lambda _: rng.random())
    by_summands: dict[frozenset[int], tuple[int, int]] = {}
    for pair in pairs:
        by_summands.setdefault(frozenset(pair), pair)
    test = dict(islice(by_summands.items(), TEST))
    chosen = test.values() if split == "test" else [pair for pair in pairs if frozenset(pair) not in test][:TRAIN]
    return [(f"{a}+{b}", {"a": a, "b": b}) for a, b in chosen]


TASKS = {"arithmetic": arithmetic}
