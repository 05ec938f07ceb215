r"""MinervaMath: 272 problems of MIT's open courses in the natural sciences and economics (Lewkowycz et al. 2022).

The gold numbers are rounded, often to two digits, and stand without their units: a number is right within 1 % of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.tasks.base import Grade, Item
from lco_lite.tasks.benchmark import Benchmark, Problem, answer_text, text
from lco_lite.tasks.final_answer import boxed
from lco_lite.tasks.math import explain
from lco_lite.tasks.source import Source, splits

TOLERANCE = 0.01


def minervamath(data: Path | None = None) -> Benchmark:
    """The task."""
    source = Source(("minerva_math_test.jsonl",), "math-ai/minervamath", "test")
    return Benchmark("minervamath", splits(data, test=source), _read, grade_rounded)


def grade_rounded(response: str, item: Item) -> Grade:
    """As mathematics, but a number within 1 % of a gold number that may be rounded is right."""
    return explain(response, item.gold, TOLERANCE)


def _read(row: Mapping[str, Any]) -> Problem:
    gold = answer_text(row) if "answer" in row else boxed(text(row, "solution"))
    if not gold:
        raise ValueError(r"field solution has no \boxed answer")
    return Problem(text(row, "problem", "question"), gold.replace("np.", "\\"))
