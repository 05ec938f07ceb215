"""GSM8K: 8,792 grade-school word problems with whole numbers as answers (Cobbe et al. 2021)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.grading.math import boxed, explain
from lco_lite.tasks.base import Benchmark, Grade, Item, Problem, answer_text, text
from lco_lite.tasks.source import Source, splits

_GSM8K = "openai/gsm8k"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k(data: Path | None = None) -> Benchmark:
    """The task; demonstrations lose their calculator marks and box their answer, as the prompt asks for."""
    train = Source(("gsm8k_train.jsonl",), _GSM8K, "train", "main")
    test = Source(("gsm8k_test.jsonl",), _GSM8K, "test", "main")
    return Benchmark("gsm8k", splits(data, train=train, test=test), _read_gsm8k, max_new_tokens=512)


def _read_gsm8k(row: Mapping[str, Any]) -> Problem:
    solution, mark, gold = text(row, "answer").rpartition("####")
    if not mark or not gold.strip():
        raise ValueError("field answer has no '#### ' with the result after it")
    gold = gold.strip().replace(",", "")
    worked = _CALCULATOR.sub("", solution).strip()
    return Problem(text(row, "question"), gold, f"{worked}\nThe answer is $\\boxed{{{gold}}}$.")


def math500(data: Path | None = None) -> Benchmark:
    """The task."""
    rest = ("math_train.jsonl", "math_test_minus_math500.jsonl")
    train = Source(rest, "nlile/hendrycks-MATH-benchmark", "train")
    test = Source(("math500_test.jsonl",), "HuggingFaceH4/MATH-500", "test")
    return Benchmark("math500", splits(data, train=train, test=test), _read_math)


def _read_math(row: Mapping[str, Any]) -> Problem | None:
    solution = text(row, "solution")
    gold = answer_text(row) if "answer" in row else boxed(solution)
    return Problem(text(row, "problem"), gold, solution) if gold else None


def amc23(data: Path | None = None) -> Benchmark:
    """AMC 12 of 2023, the problems with a whole number as answer."""
    return _contest("amc23", Source(("amc23_test.jsonl",), "math-ai/amc23", "test"), data)


def aime24(data: Path | None = None) -> Benchmark:
    """AIME I and II of 2024."""
    return _contest("aime24", Source(("aime24_test.jsonl",), "HuggingFaceH4/aime_2024", "train"), data)


def aime25(data: Path | None = None) -> Benchmark:
    """AIME I and II of 2025."""
    return _contest("aime25", Source(("aime25_test.jsonl",), "math-ai/aime25", "test"), data)


def _contest(name: str, source: Source, data: Path | None) -> Benchmark:
    return Benchmark(name, splits(data, test=source), _read_contest)


def _read_contest(row: Mapping[str, Any]) -> Problem:
    return Problem(text(row, "problem", "question"), answer_text(row))


TOLERANCE = 0.01


def minervamath(data: Path | None = None) -> Benchmark:
    """The task."""
    source = Source(("minerva_math_test.jsonl",), "math-ai/minervamath", "test")
    return Benchmark("minervamath", splits(data, test=source), _read_minerva, grade_rounded)


def grade_rounded(response: str, item: Item) -> Grade:
    """As mathematics, but a number within 1 % of a gold number that may be rounded is right."""
    return explain(response, item.gold, TOLERANCE)


def _read_minerva(row: Mapping[str, Any]) -> Problem:
    gold = answer_text(row) if "answer" in row else boxed(text(row, "solution"))
    if not gold:
        raise ValueError(r"field solution has no \boxed answer")
    return Problem(text(row, "problem", "question"), gold.replace("np.", "\\"))
