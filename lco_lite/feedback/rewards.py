"""Feedback that is one number a response: by rule, by a function of the user's, by a sequence classifier."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lco_lite.errors import UsageError
from lco_lite.judging.classifiers import SequenceClassifier
from lco_lite.messages import Message
from lco_lite.recipe import Rl
from lco_lite.user_code import function_file
from lco_lite.workers import LineWorker, NoAnswer

Conversations = Sequence[Sequence[Message]]
DataRows = Sequence[Mapping[str, Any]]
BATCH = 32  # responses that a function is given at a time


class Answers(NamedTuple):
    """N responses as they are judged: their prompts and data rows, text and token ids, and the task's grades of +1 and
    -1, [N], if it grades. ``columns`` are those of all the data: a row may lack some."""

    prompts: Conversations
    rows: DataRows
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    grades: Tensor | None = None
    columns: Sequence[str] = ()


RewardSource = Callable[[Answers], Tensor]
"""Answers -> rewards, [N]; nan where one does not apply."""


def reward_sources(rl: Rl, device: torch.device) -> dict[str, RewardSource]:
    """Where each reward of the feedback comes from, by its name; none for feedback on tokens alone."""
    sources: dict[str, RewardSource] = {}
    if "rule" in rl.reward_parts:
        sources["rule"] = rule
    for name, spec in rl.reward_functions.items():
        sources[name] = RewardFunction(spec, rl.reward_timeout)
    if rl.reward_classifier is not None:
        classifier = SequenceClassifier(rl.reward_classifier, device)
        sources["reward_model"] = lambda answers: classifier(answers.prompts, answers.texts)
    return sources


def rule(answers: Answers) -> Tensor:
    """+1 right, -1 wrong (paper, eq 11): the grades themselves."""
    assert answers.grades is not None, "the recipe makes sure of a task, and its prompts are its items"
    return answers.grades


def columns_of(rows: DataRows) -> list[str]:
    """The names of all columns, in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row))


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
        about = self._ask("about", "")
        self.signature, self.takes_ids = str(about["signature"]), bool(about["takes_ids"])

    def __call__(self, answers: Answers) -> Tensor:
        """Raises UsageError naming the response, counted from 1 within the phase."""
        rewards: list[float] = []
        columns = answers.columns or columns_of(answers.rows)
        for first in range(0, len(answers.texts), BATCH):
            part = slice(first, first + BATCH)
            prompts, texts, rows = answers.prompts[part], answers.texts[part], answers.rows[part]
            in_turns = has_turns(rows[0])
            known = [
                {"row": dict(row), "lacks": [name for name in columns if name not in row]}
                | {"turns": [dict(turn) for turn in prompt] if in_turns else None, "ids": list(ids)}
                for prompt, row, ids in zip(prompts, rows, answers.ids[part] or [[]] * len(rows), strict=True)
            ]
            line = json.dumps([[p[-1]["content"] for p in prompts], list(texts), known], default=str)
            judged = self._ask(line, f", responses {first + 1} to {first + len(texts)} of the phase")
            if "error" in judged:
                at = judged["response"]
                where = "" if at is None else f", response {first + at + 1} of the phase ({texts[at]!r:.80})"
                raise UsageError(f"{self.spec}{where}: {judged['error']}")
            rewards += [math.nan if reward is None else reward for reward in judged["rewards"]]
        return torch.tensor(rewards)

    def close(self) -> None:
        self._worker.close()

    def _ask(self, line: str, which: str) -> dict[str, Any]:
        try:
            answer = self._worker.ask(line, self.seconds)
        except NoAnswer as e:
            raise UsageError(f"{self.spec}{which}: {e}; rl.reward_timeout sets the limit") from e
        return json.loads(answer)  # type: ignore[no-any-return]


def has_turns(row: Mapping[str, Any]) -> bool:
    """Whether the data has conversations, not texts, as TRL tells it: by the prompt."""
    return any(isinstance(row.get(name), list) for name in ("prompt", "messages", "conversations"))


def try_functions(
    rl: Rl, prompt: Sequence[Message], row: Mapping[str, Any], columns: Sequence[str], text: str
) -> list[str]:
    """Each reward function called once, on the response ``text`` to a real prompt: a line on each, with how it is
    called and what it said. Raises UsageError as the call of a phase does, before anything is trained."""
    told = []
    for name, spec in rl.reward_functions.items():
        try:
            function = RewardFunction(spec, rl.reward_timeout)
        except UsageError as e:
            raise UsageError(f"rl.reward_function: {e}") from e
        try:
            reward = function(Answers([prompt], [row], [text], [[0]], columns=columns)).item()
        except UsageError as e:
            raise UsageError(f"rl.reward_function, tried on {prompt[-1]['content']!r:.60}: {e}") from e
        finally:
            function.close()
        said = "does not apply" if math.isnan(reward) else f"{reward:g}"
        told.append(
            f"reward {name}: {spec}, called by {function.signature}; the first prompt with {text!r:.40}: {said}"
        )
    return told
