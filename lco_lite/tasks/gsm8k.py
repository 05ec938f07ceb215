"""GSM8K: 8,792 grade-school word problems with whole numbers as answers (Cobbe et al. 2021)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.tasks.benchmark import Benchmark, Problem, text
from lco_lite.tasks.source import Source, splits

_HUB = "openai/gsm8k"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k(data: Path | None = None) -> Benchmark:
    """The task; demonstrations lose their calculator marks and box their answer, as the prompt asks for."""
    train = Source(("gsm8k_train.jsonl",), _HUB, "train", "main")
    test = Source(("gsm8k_test.jsonl",), _HUB, "test", "main")
    return Benchmark("gsm8k", splits(data, train=train, test=test), _read, max_new_tokens=512)


def _read(row: Mapping[str, Any]) -> Problem:
    solution, mark, gold = text(row, "answer").rpartition("####")
    if not mark or not gold.strip():
        raise ValueError("field answer has no '#### ' with the result after it")
    gold = gold.strip().replace(",", "")
    worked = _CALCULATOR.sub("", solution).strip()
    return Problem(text(row, "question"), gold, f"{worked}\nThe answer is $\\boxed{{{gold}}}$.")
