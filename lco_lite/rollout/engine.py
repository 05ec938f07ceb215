"""Prompts in, responses out: the protocol every rollout engine keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lco_lite.sequences import Example


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``max_new_tokens`` counts the end of turn; ``batch`` responses are made at once."""

    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int


@dataclass(frozen=True)
class Response:
    """``example``: prompt and response ids, the end of turn included where the model closed it.

    ``truncated``: the length limit came first.
    """

    example: Example
    truncated: bool


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, on_batch: Callable[[int], None] = ...
    ) -> list[Response]:
        """One response a prompt, in the prompts' order. ``on_batch(done)`` is called after each batch and may raise."""
        ...
