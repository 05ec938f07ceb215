"""Feedback that is one number a response: by rule, by a function of the user's, by a sequence classifier."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lco_lite.errors import UsageError
from lco_lite.judging.classifiers import SequenceClassifier
from lco_lite.models.chat import Message
from lco_lite.recipe import Rl
from lco_lite.user_code import function_file
from lco_lite.workers import LineWorker, NoAnswer

Conversations = Sequence[Sequence[Message]]
DataRows = Sequence[Mapping[str, Any]]
RewardSource = Callable[[Conversations, DataRows, Sequence[str], Tensor | None], Tensor]
"""(prompts, their data rows, responses, the task's grades of +1 and -1 if it grades) -> rewards, [N]."""
BATCH = 32  # responses that a function is given at a time


def reward_sources(rl: Rl, device: torch.device) -> dict[str, RewardSource]:
    """Where each reward of the feedback comes from, by its name; none for feedback on tokens alone."""
    sources: dict[str, RewardSource] = {}
    if "rule" in rl.reward_parts:
        sources["rule"] = rule
    for name, spec in rl.reward_functions.items():
        sources[name] = by_function(RewardFunction(spec, rl.reward_timeout))
    if rl.reward_classifier is not None:
        classifier = SequenceClassifier(rl.reward_classifier, device)
        sources["reward_model"] = lambda prompts, rows, texts, grades: classifier(prompts, texts)
    return sources


def rule(prompts: Conversations, rows: DataRows, texts: Sequence[str], grades: Tensor | None) -> Tensor:
    """+1 right, -1 wrong (paper, eq 11): the grades themselves."""
    assert grades is not None, "the recipe makes sure of a task, and its prompts are its items"
    return grades


def by_function(function: "RewardFunction") -> RewardSource:
    """The user's function sees the last turn of a prompt."""
    return lambda prompts, rows, texts, grades: function([p[-1]["content"] for p in prompts], texts, rows)


class RewardFunction:
    """``spec`` is FILE.py:NAME, which is imported in a process of its own and nowhere else; that may take ``seconds``,
    and so may a batch. Raises UsageError for what is wrong with the file, before the first rollout."""

    def __init__(self, spec: str, seconds: float) -> None:
        file = function_file(spec)
        self.spec, self.seconds = spec, seconds
        self._worker = LineWorker("lco_lite.user_code", spec, seconds=seconds)
        try:
            said = self._worker.ready()
        except NoAnswer as e:
            raise UsageError(f"{file}: cannot be imported: {e}; rl.reward_timeout sets the limit") from e
        if said != "ready":
            raise UsageError(json.loads(said)["error"])

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: DataRows) -> Tensor:
        """[N] rewards. Raises UsageError naming the response, counted from 1 within the phase."""
        rewards: list[float] = []
        for first in range(0, len(responses), BATCH):
            part = slice(first, first + BATCH)
            rewards += self._ask(prompts[part], responses[part], [dict(row) for row in rows[part]], first)
        return torch.tensor(rewards)

    def _ask(self, prompts: Sequence[str], responses: Sequence[str], rows: DataRows, first: int) -> list[float]:
        try:
            answer = self._worker.ask(json.dumps([prompts, responses, rows], default=str), self.seconds)
        except NoAnswer as e:
            raise UsageError(
                f"{self.spec}, responses {first + 1} to {first + len(responses)} of the phase: {e}; "
                "rl.reward_timeout sets the limit"
            ) from e
        judged = json.loads(answer)
        if "error" not in judged:
            return judged["rewards"]
        at = judged["response"]
        where = "" if at is None else f", response {first + at + 1} of the phase ({responses[at]!r:.80})"
        raise UsageError(f"{self.spec}{where}: {judged['error']}")
