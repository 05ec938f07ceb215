"""QA-Feedback (Wu et al. 2023, FG-RLHF): a question and passages of Wikipedia, to be answered in a few sentences.

Reward models score relevance of clauses, factuality of sentences and completeness of the whole answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lco_lite.console import Console
from lco_lite.errors import DataError, UsageError, naming
from lco_lite.files import write_text
from lco_lite.models.fingerprint import known_by
from lco_lite.recipe import Eval
from lco_lite.tasks.base import FOLDER, Problem, Rows, Task, first_file, read_rows, text

if TYPE_CHECKING:
    from lco_lite.judging.classifiers import Reward

FILES = {
    "train": ("qa_feedback_train.jsonl", "qa_feedback_train_1k.jsonl"),
    "test": ("qa_feedback_test.jsonl", "qa_feedback_dev.jsonl", "qa_feedback_dev_feedback.jsonl"),
}
ASPECTS = ("relevance", "factuality", "completeness")


class QaFeedback(Task):
    """Neither right nor wrong: the mean of three rewards."""

    def check(self, settings: Eval, n: int, passes: int, console: Console) -> None:
        missing = [name for name in ASPECTS if getattr(settings.reward_models, name) is None]
        if missing:
            wanted = " ".join(f"-s eval.reward_models.{name}=ID_OR_FOLDER" for name in missing)
            raise UsageError(
                f"task {self.name} needs three reward models; without a name: {', '.join(missing)}. Add {wanted} "
                "(each a token- or sequence-classification model in safetensors)"
            )
        from lco_lite.judging.classifiers import classifier_config

        for name in ASPECTS:
            with naming(f"eval.reward_models.{name}"):
                classifier_config(getattr(settings.reward_models, name), ("token", "sequence"))

    def scored_by(self, settings: Eval) -> dict[str, Any]:
        named = settings.reward_models.model_dump()
        return {"reward_models": {name: path and known_by(path) for name, path in named.items()}}

    def aggregate(self, rows: list[dict[str, Any]], settings: Eval, folder: Path, console: Console) -> dict[str, Any]:
        """``reward``, the mean of the three; each of them, a number an answer; and of token classifiers the share of
        all segments without an error, which FG-RLHF reports.

        Writes ``rewards.jsonl``. Raises UsageError where a model is not named, ModelError where one cannot be loaded.
        """
        self.check(settings, len(rows), 1, console)
        rewards = {name: _rewards(name, rows, settings, console) for name in ASPECTS}
        lines = [{"id": row["id"], **{name: rewards[name][i].value for name in ASPECTS}} for i, row in enumerate(rows)]
        write_text(folder / "rewards.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        values = {name: [one.value for one in rewards[name]] for name in ASPECTS}
        tokens = {name: scored for name, scored in rewards.items() if all(one.good is not None for one in scored)}
        shares = {
            f"{name}_share": sum(one.good or 0 for one in scored) / max(sum(one.segments for one in scored), 1)
            for name, scored in tokens.items()
        }
        return {
            "reward": [sum(three) / len(ASPECTS) for three in zip(*values.values(), strict=True)],
            **values,
            **shares,
        }


def _rewards(name: str, rows: Sequence[Mapping[str, Any]], settings: Eval, console: Console) -> list[Reward]:
    import torch

    from lco_lite.judging.classifiers import SegmentClassifier, Text, clauses, sentences

    path = getattr(settings.reward_models, name)
    console.note(f"{name}: {path} scores {len(rows)} answers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SegmentClassifier(path, clauses if name == "relevance" else sentences, device)
    # FG-RLHF's model of relevance reads the question alone
    contexts = ["" if name == "relevance" else _context(row["row"]["passages"]) for row in rows]
    answers = [row["response"].rpartition("</think>")[2].strip() for row in rows]
    questions = [row["row"]["question"] for row in rows]
    return model([Text(*parts) for parts in zip(questions, contexts, answers, strict=True)])


def qa_feedback(data: Path | None = None) -> Task:
    """Question and passages as FG-RLHF writes them, the first answer as gold and demonstration."""
    sources = {split: partial(_rows, split) for split in FILES}
    return QaFeedback("qa_feedback", sources, _read, data, grader=None, template="{problem}", max_new_tokens=200)


def qa_prompt(question: str, passages: Sequence[Any]) -> str:
    """``question: … context: wikipage: TITLE text: … | …``. A passage is ``{"wikipage", "content"}`` or a list of its
    title and sentences. Raises ValueError for another."""
    return f"question: {question.strip()}" + (f" context: {_context(passages)}" if passages else "")


def _context(passages: Sequence[Any]) -> str:
    return " | ".join(f"wikipage: {title} text: {content}" for title, content in map(_passage, passages))


def _passage(passage: Any) -> tuple[str, str]:
    if isinstance(passage, Mapping) and all(isinstance(passage.get(key), str) for key in ("wikipage", "content")):
        return passage["wikipage"], passage["content"]
    if isinstance(passage, (list, tuple)) and len(passage) > 1 and all(isinstance(part, str) for part in passage):
        return passage[0], " ".join(passage[1:])
    raise ValueError(f"passage {passage!r:.60} has neither wikipage and content nor a title and sentences")


def _rows(split: str, folder: Path | None) -> Rows:
    if file := first_file(folder, FILES[split]):
        return read_rows(file)
    where = f"the folder {str(folder):.200} has no" if folder else f"{FOLDER} names no folder with"
    source = f"{split}.json from tasks/qa_feedback/data of FG-RLHF's repository (allenai/FineGrainedRLHF on GitHub)"
    raise DataError(f"{where} {' or '.join(FILES[split])}. Take {source}, and write each object of its list on a line")


def _read(row: Mapping[str, Any]) -> Problem:
    question, passages = text(row, "question"), row["passages"]
    if not isinstance(passages, (list, tuple)):
        raise ValueError(f"field passages is {passages!r:.60}, not a list")
    answer = row["answer"] if "answer" in row else row["gold"]
    if isinstance(answer, (list, tuple)) and answer:
        answer = answer[0]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"field answer or gold is {answer!r:.60}, neither a text nor a list of texts")
    return Problem(qa_prompt(question, passages), answer.strip(), answer.strip())


TASKS = {"qa_feedback": qa_feedback}
