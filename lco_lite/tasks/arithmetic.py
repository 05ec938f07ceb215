"""Two-digit addition with the working written out from the right: ``47+38`` -> ``7+8+0=15 4+3+1=8 #85``.

Generated, so it needs no data and no network. A direct answer is too hard for a very small model; with the working each
token follows from a few others. No test problem occurs in ``train``, not even with its summands swapped.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from lco_lite.errors import UsageError
from lco_lite.tasks.base import Grade, Item

TRAIN, TEST = 5_000, 1_000
_SEED = 20_260_300


@dataclass
class Arithmetic:
    """``train``: 5,000 problems with demonstrations; ``test``: 1,000 held out. Each split in a fixed random order."""

    name: str = "arithmetic"
    template: str = "{problem}"
    system: str | None = None
    max_new_tokens: int = 32  # the longest response is 23 bytes, and its end-of-sequence token

    def items(self, split: str) -> Sequence[Item]:
        """Items of ``train`` or ``test``. Raises UsageError for any other split."""
        splits = _splits()
        if split not in splits:
            raise UsageError(f"task {self.name} has the splits {', '.join(splits)}; {split!r} is none of them")
        return splits[split]

    def grade(self, response: str, item: Item) -> Grade:
        """Exact match of what stands after the last ``#``."""
        _, mark, answer = response.rpartition("#")
        if not mark:
            return Grade(False, None, "no # in the response")
        answer = answer.strip()
        right = answer == item.gold
        return Grade(right, answer, "equal" if right else f"{answer[:20]!r} is not {item.gold}")

    def first_error(self, response: str, item: Item) -> int | None:
        """Where the response departs from the one right working (its length if it stops too early); None if right."""
        right, response = working(item.row["a"], item.row["b"]), response.rstrip()
        if response == right:
            return None
        for i, (got, wanted) in enumerate(zip(response, right, strict=False)):
            if got != wanted:
                return i
        return min(len(response), len(right))


def working(a: int, b: int) -> str:
    """The response to ``a+b``: one sum a column, units first, the carry as third summand, then ``#`` and the answer."""
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}+0={units} {a // 10}+{b // 10}+{carry}={tens} #{a + b}"


def _item(a: int, b: int, shown: bool) -> Item:
    prompt = f"{a}+{b}"
    return Item(f"arithmetic/{prompt}", prompt, str(a + b), working(a, b) if shown else None, {"a": a, "b": b})


@cache
def _splits() -> dict[str, tuple[Item, ...]]:
    # random() is the one method whose sequence Python promises to keep for ever, hence sorting by it, not shuffle().
    rng = random.Random(_SEED)
    pairs = sorted(product(range(10, 100), repeat=2), key=lambda _: rng.random())
    test: list[tuple[int, int]] = []
    held_out: set[tuple[int, int]] = set()
    for a, b in pairs:
        if len(test) == TEST:
            break
        if (a, b) not in held_out:
            test.append((a, b))
            held_out |= {(a, b), (b, a)}
    train = [pair for pair in pairs if pair not in held_out][:TRAIN]
    return {
        "train": tuple(_item(a, b, shown=True) for a, b in train),
        "test": tuple(_item(a, b, shown=False) for a, b in test),
    }
