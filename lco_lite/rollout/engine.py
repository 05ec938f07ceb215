"""Prompts in, responses out: the protocol every rollout engine keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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


def in_batches(
    prompts: Sequence[list[int]],
    size: int,
    generate: Callable[[list[list[int]]], list[Response]],
    on_batch: Callable[[int], None],
) -> list[Response]:
    """``generate`` on ``size`` prompts at a time, like lengths together; answers in the order of the prompts."""
    responses: dict[int, Response] = {}
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        responses.update(zip(chosen, generate([prompts[i] for i in chosen]), strict=True))
        on_batch(len(responses))
    return [responses[i] for i in range(len(prompts))]


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), each [B, longest]: every response begins in the same column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def finished(prompt: list[int], ids: list[int], stop_ids: set[int]) -> Response:
    """A response ends with its first stop token; without one the length limit cut it."""
    stop = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return Response(Example(prompt, ids if stop is None else ids[: stop + 1]), truncated=stop is None)
