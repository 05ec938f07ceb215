"""MATH500: 500 competition problems held out from MATH (Hendrycks et al. 2021; Lightman et al. 2023).

``train`` is the rest of MATH, 12,000 problems with solutions, as in the paper. A row whose solution boxes nothing is
left out, since no response could be graded against it: there are two in circulating copies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.tasks.benchmark import Benchmark, Problem, answer_text, text
from lco_lite.tasks.final_answer import boxed
from lco_lite.tasks.source import Source, splits


def math500(data: Path | None = None) -> Benchmark:
    """The task."""
    rest = ("math_train.jsonl", "math_test_minus_math500.jsonl")
    train = Source(rest, "nlile/hendrycks-MATH-benchmark", "train")
    test = Source(("math500_test.jsonl",), "HuggingFaceH4/MATH-500", "test")
    return Benchmark("math500", splits(data, train=train, test=test), _read)


def _read(row: Mapping[str, Any]) -> Problem | None:
    solution = text(row, "solution")
    gold = answer_text(row) if "answer" in row else boxed(solution)
    return Problem(text(row, "problem"), gold, solution) if gold else None
