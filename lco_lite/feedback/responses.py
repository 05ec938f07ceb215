"""Feedback that is one number a response: by rule, by a function of the user's, by a sequence classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lco_lite.data.prepare import Prompt
from lco_lite.feedback.function import RewardFunction
from lco_lite.models.classifier import SequenceClassifier
from lco_lite.recipe import Rl

Rater = Callable[[Sequence[Prompt], Sequence[str], Tensor | None], Tensor]


def open_rater(rl: Rl, device: torch.device) -> Rater | None:
    """(prompts, responses, the task's grades of ±1 where it has any) -> rewards, [N]; None for feedback of tokens."""
    if rl.feedback == "rule":
        return rule
    if rl.reward_function is not None:
        function = RewardFunction(rl.reward_function, rl.reward_timeout)
        return lambda prompts, texts, grades: function(
            [p.messages[-1]["content"] for p in prompts], texts, [p.row for p in prompts]
        )
    if rl.reward_classifier is not None:
        classifier = SequenceClassifier(rl.reward_classifier, device)
        return lambda prompts, texts, grades: classifier([p.messages for p in prompts], texts)
    return None


def rule(prompts: Sequence[Prompt], texts: Sequence[str], grades: Tensor | None) -> Tensor:
    """+1 right, -1 wrong (paper, eq 11)."""
    assert grades is not None, "the recipe makes sure of a task, and its prompts are its items"
    return grades
