"""The benchmarks of mathematics, a section each: GSM8K, MATH500, AMC and AIME, MinervaMath."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lco_lite.grading.math import MathGrader, boxed
from lco_lite.tasks.base import Problem, Source, Task, answer_text, text

# GSM8K (Cobbe et al. 2021): 8,792 grade-school word problems with whole numbers as answers.


def gsm8k(data: Path | None = None) -> Task:
    """Demonstrations lose their calculator marks and box their answer, as the prompt asks for."""
    train = Source(("gsm8k_train.jsonl",), "openai/gsm8k", "train", "main")
    test = Source(("gsm8k_test.jsonl",), "openai/gsm8k", "test", "main")
    return Task("gsm8k", {"train": train, "test": test}, _read_gsm8k, data, max_new_tokens=512)


def _read_gsm8k(row: Mapping[str, Any]) -> Problem:
    solution, mark, gold = text(row, "answer").rpartition("####")
    if not mark or not gold.strip():
        raise ValueError("field answer has no '#### ' with the result after it")
    gold = gold.strip().replace(",", "")
    worked = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return Problem(text(row, "question"), gold, f"{worked}\nThe answer is $\\boxed{{{gold}}}$.")


# MATH500: 500 problems of MATH (Hendrycks et al. 2021; Lightman et al. 2023). ``train`` is the other 12,000, as in LCO.


def math500(data: Path | None = None) -> Task:
    """Without the rows whose solution boxes nothing (circulating copies have two): nothing could be graded by them."""
    rest = ("math_train.jsonl", "math_test_minus_math500.jsonl")
    train = Source(rest, "nlile/hendrycks-MATH-benchmark", "train")
    test = Source(("math500_test.jsonl",), "HuggingFaceH4/MATH-500", "test")
    return Task("math500", {"train": train, "test": test}, _read_math, data)


def _read_math(row: Mapping[str, Any]) -> Problem | None:
    solution = text(row, "solution")
    gold = answer_text(row) if "answer" in row else boxed(solution)
    return Problem(text(row, "problem"), gold, solution) if gold else None


# AMC 12 of 2023 (40 problems, those with a whole number as answer), AIME I and II of 2024 and of 2025 (30 each).

_CONTESTS = {
    "amc23": Source(("amc23_test.jsonl",), "math-ai/amc23", "test"),
    "aime24": Source(("aime24_test.jsonl",), "HuggingFaceH4/aime_2024", "train"),
    "aime25": Source(("aime25_test.jsonl",), "math-ai/aime25", "test"),
}


def contest(name: str, data: Path | None = None) -> Task:
    return Task(name, {"test": _CONTESTS[name]}, _read_contest, data)


def _read_contest(row: Mapping[str, Any]) -> Problem:
    return Problem(text(row, "problem", "question"), answer_text(row))


# MinervaMath (Lewkowycz et al. 2022): 272 problems of MIT's courses; the gold numbers are rounded and without units.


def minervamath(data: Path | None = None) -> Task:
    """A number is right within 1 % of the gold one."""
    test = Source(("minerva_math_test.jsonl",), "math-ai/minervamath", "test")
    return Task("minervamath", {"test": test}, _read_minerva, data, MathGrader(tolerance=0.01))


def _read_minerva(row: Mapping[str, Any]) -> Problem:
    gold = answer_text(row) if "answer" in row else boxed(text(row, "solution"))
    if not gold:
        raise ValueError(r"field solution has no \boxed answer")
    return Problem(text(row, "problem", "question"), gold.replace("np.", "\\"))


TASKS = {"gsm8k": gsm8k, "math500": math500, "minervamath": minervamath}
TASKS |= {name: partial(contest, name) for name in _CONTESTS}
