"""Token sequences as every part passes them on: examples, padded batches, and which positions belong to responses.

Legend: B sequences, L padded length, T response tokens of the batch, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lco_lite.seeding import derive


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation: the ``prompt``, and the ``response`` that is trained on or scored."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and, flattened over them in order, their response tokens."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    index: Tensor  # [T] into the flattened B * L: the position whose hidden state predicts the token
    actions: Tensor  # [T] the response tokens
    rows: Tensor  # [T] the sequence each belongs to

    def select(self, hidden: Tensor) -> Tensor:
        """[B, L, d] -> [T, d]: only response tokens ever reach a loss."""
        return hidden.flatten(0, 1)[self.index]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One right-padded batch. Every example has at least one prompt token."""
    length = max(len(e) for e in examples)
    ids = torch.full((len(examples), length), pad_id)
    mask = torch.zeros_like(ids)
    index, rows = [], []
    for b, e in enumerate(examples):
        ids[b, : len(e)] = torch.tensor(e.prompt + e.response)
        mask[b, : len(e)] = 1
        first = b * length + len(e.prompt) - 1
        index.append(torch.arange(first, first + len(e.response)))
        rows.append(torch.full((len(e.response),), b))
    actions = torch.tensor([token for e in examples for token in e.response], dtype=torch.long)
    return Batch(ids, mask, torch.cat(index), actions, torch.cat(rows))


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped by length so that no group's padded size passes ``max_tokens`` (a single long one may)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def endless(n: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start..start+count-1 of the endless list of passes over 0..n-1, each pass shuffled anew."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, offset = divmod(start + len(chosen), n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(derive(seed, "pass", epoch))).tolist()
        chosen += order[offset : offset + count - len(chosen)]
    return chosen
