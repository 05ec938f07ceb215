"""MMLU (Hendrycks et al. 2021) and MMLU-Redux (Gema et al. 2024): four choices, one right, 57 subjects.

``item.row`` has ``choices`` (four texts) and ``answer`` (index of the right one). ``dev`` has five examples a subject.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lco_lite.grading.choice import LETTERS, grade_choice
from lco_lite.tasks.base import EVERY_CONFIG, Problem, Rows, Source, Task, lettered, text

_DEV = Source(("mmlu_dev.jsonl",), "cais/mmlu", "dev", "all")
_TEST = Source(("mmlu_test.jsonl",), "cais/mmlu", "test", "all")
_REDUX = Source(("mmlu_redux.jsonl",), "edinburgh-dawg/mmlu-redux-2.0", "test", EVERY_CONFIG)


def _read(row: Mapping[str, Any]) -> Problem:
    choices, answer = row["choices"], row["answer"]
    listed = lettered(choices)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"field answer is {answer!r:.60}, not the index of one of {len(choices)} choices")
    letter = LETTERS[answer]
    return Problem(f"{text(row, 'question')}\n\n{listed}", letter, f"\\boxed{{{letter}}}")


def _read_faultless(row: Mapping[str, Any]) -> Problem | None:
    """The annotators spell their verdict in several ways: ok, OK, Ok."""
    return _read(row) if _verdict(row) == "ok" else None


def _read_corrected(row: Mapping[str, Any]) -> Problem | None:
    """The faultless, and of those with a wrong answer the ones for which the annotators name another choice, by its
    letter or its index."""
    if _verdict(row) != "wrong groundtruth":
        return _read_faultless(row)
    given, named = _read(row), str(row["correct_answer"]).strip()
    right = next((i for i in range(len(row["choices"])) if named in (str(i), LETTERS[i])), row["answer"])
    corrected = {**row, "answer": right}
    return None if _read(corrected).gold == given.gold else _read(corrected)._replace(row=corrected)


def _verdict(row: Mapping[str, Any]) -> str:
    return text(row, "error_type").replace("_", " ").casefold()


def _dev_marked_ok(folder: Path | None) -> Rows:
    """MMLU's examples, which nobody has annotated."""
    return [(place, row | {"error_type": "ok"}) for place, row in _DEV(folder)]


_KINDS: dict[str, tuple[Callable[[Path | None], Rows], Source, Callable[[Mapping[str, Any]], Problem | None]]] = {
    "mmlu": (_DEV, _TEST, _read),  # 14,042 questions, and 285 answered ones
    "mmlu_redux": (_dev_marked_ok, _REDUX, _read_faultless),  # the 5,330 that its annotators found to be without fault
    "mmlu_redux_corrected": (_dev_marked_ok, _REDUX, _read_corrected),  # and 101 with their corrected answers
    "mmlu_redux_all": (_DEV, _REDUX, _read),  # all 5,700 against MMLU's own answers, right or wrong
}


def choices(name: str, data: Path | None = None) -> Task:
    dev, test, read = _KINDS[name]
    reason = "{problem}\n\nReason briefly, and put the letter of the right choice within \\boxed{}."
    answer = "{problem}\n\nAnswer with the letter of the right choice."
    return Task(name, {"dev": dev, "test": test}, read, data, grade_choice, reason, answer, max_new_tokens=512)


TASKS = {name: partial(choices, name) for name in _KINDS}
