"""MMLU (Hendrycks et al. 2021) and MMLU-Redux (Gema et al. 2024): four choices, one right, 57 subjects.

Answered by generation, or by log-likelihood of the letters: ``item.row`` has ``choices`` (four texts) and ``answer``
(index of the right one). ``dev`` has five answered questions a subject, to be shown as examples.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lco_lite.grading.choice import LETTERS, grade_choice
from lco_lite.tasks.base import Benchmark, Problem, Read, text
from lco_lite.tasks.source import EVERY_CONFIG, Rows, Source, splits

TEMPLATE = "{problem}\n\nReason briefly, and put the letter of the right choice within \\boxed{}."
LIKELIHOOD_TEMPLATE = "{problem}\n\nAnswer with the letter of the right choice."
_DEV = Source(("mmlu_dev.jsonl",), "cais/mmlu", "dev", "all")
_REDUX = Source(("mmlu_redux.jsonl",), "edinburgh-dawg/mmlu-redux-2.0", "test", EVERY_CONFIG)


def mmlu(data: Path | None = None) -> Benchmark:
    """14,042 questions, and 285 answered ones."""
    test = Source(("mmlu_test.jsonl",), "cais/mmlu", "test", "all")
    return _choices("mmlu", splits(data, dev=_DEV, test=test), _read)


def mmlu_redux(data: Path | None = None) -> Benchmark:
    """The questions of MMLU-Redux that its annotators found to be without fault (5,330 of 5,700)."""
    found = splits(data, dev=_DEV, test=_REDUX)
    examples = found["dev"]  # MMLU's, which nobody has annotated
    return _choices("mmlu_redux", found | {"dev": lambda: _marked_ok(examples())}, _read_faultless)


def mmlu_redux_all(data: Path | None = None) -> Benchmark:
    """All 5,700 questions of MMLU-Redux, against MMLU's own answers, right or wrong."""
    return _choices("mmlu_redux_all", splits(data, dev=_DEV, test=_REDUX), _read)


def _choices(name: str, found: Mapping[str, Callable[[], Rows]], read: Read) -> Benchmark:
    return Benchmark(
        name, found, read, grade_choice, TEMPLATE, max_new_tokens=512, likelihood_template=LIKELIHOOD_TEMPLATE
    )


def _marked_ok(rows: Rows) -> Rows:
    return [(at, row | {"error_type": "ok"}) for at, row in rows]


def _read_faultless(row: Mapping[str, Any]) -> Problem | None:
    """The annotators spell their verdict in several ways: ok, OK, Ok."""
    return _read(row) if text(row, "error_type").casefold() == "ok" else None


def _read(row: Mapping[str, Any]) -> Problem:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"field choices is {choices!r:.60}, not a list of 2 to {len(LETTERS)} texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"field answer is {answer!r:.60}, not the index of one of {len(choices)} choices")
    lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    letter = LETTERS[answer]
    return Problem("\n".join([text(row, "question"), "", *lettered]), letter, f"\\boxed{{{letter}}}")
