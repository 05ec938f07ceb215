"""AMC 2023 and AIME 2024, 2025: contest problems with whole numbers as answers; 40, 30 and 30 of them, all held out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.tasks.benchmark import Benchmark, Problem, answer_text, text
from lco_lite.tasks.source import Source, splits


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
    return Benchmark(name, splits(data, test=source), _read)


def _read(row: Mapping[str, Any]) -> Problem:
    return Problem(text(row, "problem", "question"), answer_text(row))
