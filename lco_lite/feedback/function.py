"""Feedback from a function of the user's: ``rl.feedback: function`` with ``rl.reward_function: FILE.py:NAME``.

    def NAME(prompts, responses, rows):
        return [number for each response]

``prompts`` and ``responses`` are texts, ``rows`` the data rows of the prompts (empty where there are none). It runs in
a process of its own, a batch at a time; a batch that takes too long or fails ends the training with a message that
names the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lco_lite.errors import UsageError
from lco_lite.line_worker import LineWorker
from lco_lite.user_code import load_function

BATCH = 32


class RewardFunction:
    """``spec`` is FILE.py:NAME; a batch may take ``seconds``."""

    def __init__(self, spec: str, seconds: float) -> None:
        load_function(spec)  # what is wrong with the file is said before the first rollout
        self.spec, self.seconds = spec, seconds
        self._worker = LineWorker("lco_lite.feedback.function_worker", [spec])

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """[N] rewards. Raises UsageError naming the row, counted from 1 within the phase."""
        rewards: list[float] = []
        for first in range(0, len(responses), BATCH):
            part = slice(first, first + BATCH)
            rewards += self._batch(list(prompts[part]), list(responses[part]), [dict(r) for r in rows[part]], first)
        return torch.tensor(rewards)

    def _batch(self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]], first: int) -> list[float]:
        answer = self._worker.ask(json.dumps([prompts, responses, rows], default=str), self.seconds)
        where = f"{self.spec}, responses {first + 1} to {first + len(responses)} of the phase"
        if answer is None:
            raise UsageError(
                f"{where}: no answer within {self.seconds:g} s, or its process died; rl.reward_timeout sets the limit"
            )
        found = json.loads(answer)
        if "error" in found:
            raise UsageError(f"{self.spec}{_at(found['row'], responses, first)}: {found['error']}")
        return found["rewards"]


def _at(row: int | None, responses: Sequence[str], first: int) -> str:
    return "" if row is None else f", response {first + row + 1} of the phase ({responses[row]!r:.80})"
