"""What a batch is made of, and in which order: token sequences, their padding, micro-batches; then random numbers.

Random numbers go by name: what is drawn depends on the seed and on what it is for, never on what was drawn before.

Legend: B sequences, L the longest of them, T response tokens of all of them, d hidden.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lco_lite import ranks


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

    @property
    def lengths(self) -> list[int]:
        """Of the sequences."""
        return list(self.attention_mask.sum(1).tolist())

    def only(self, rows: Sequence[int]) -> Batch:
        """These of its sequences, in their order, padded no further than they need."""
        kept, width = torch.tensor(rows), int(self.attention_mask[rows].sum(1).max())
        place = torch.full((len(self.input_ids),), -1).index_put((kept,), torch.arange(len(rows)))[self.rows]
        mine = place >= 0
        index = place[mine] * width + self.index[mine] % self.input_ids.shape[1]
        return Batch(
            self.input_ids[kept, :width], self.attention_mask[kept, :width], index, self.actions[mine], place[mine]
        )

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One right-padded batch. Every example has at least one prompt token."""
    ids = pad_sequence([torch.tensor(e.prompt + e.response) for e in examples], True, pad_id)
    mask = pad_sequence([torch.ones(len(e), dtype=torch.long) for e in examples], True)
    first = [b * ids.shape[1] + len(e.prompt) - 1 for b, e in enumerate(examples)]
    index = torch.cat([torch.arange(i, i + len(e.response)) for i, e in zip(first, examples, strict=True)])
    actions = torch.tensor([token for e in examples for token in e.response], dtype=torch.long)
    lengths = torch.tensor([len(e.response) for e in examples])
    rows = torch.arange(len(examples)).repeat_interleave(lengths, output_size=len(actions))
    return Batch(ids, mask, index, actions, rows)


def micro_batches(lengths: Sequence[int], max_tokens: int, group: int = 1, shares: int = 1) -> list[list[int]]:
    """Indices batched by length so that no batch's padded size passes ``max_tokens`` (a single long unit may).

    A unit is ``group`` consecutive entries, which stay together; it is as long as the longest of them. For several
    ``shares`` units are dealt by length: batches i, i + shares, … are share i, empty at the end where another has more.
    """
    units = [range(len(lengths))[first : first + group] for first in range(0, len(lengths), group)]
    longest_first = sorted(units, key=lambda unit: (-max(lengths[i] for i in unit), unit[0]))
    dealt = [_filled(longest_first[i::shares], lengths, max_tokens) for i in range(shares)]
    return [batch for turn in zip_longest(*dealt, fillvalue=[]) for batch in turn]


def own_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """This rank's share of them."""
    return [batch for batch in ranks.share(micro_batches(lengths, max_tokens, shares=ranks.world())) if batch]


def _filled(longest_first: Sequence[range], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    longest = 0  # entry of the last batch
    for unit in longest_first:
        if not batches or longest * (len(batches[-1]) + len(unit)) > max_tokens:
            batches.append([])
            longest = max(lengths[i] for i in unit)
        batches[-1] += unit
    return batches


def halved(minibatches: Iterable[Sequence[int]], max_tokens: int, group: int = 1) -> tuple[int, int] | None:
    """(padded size of the largest micro-batch of several units, half of it) among those that ``micro_batches`` makes of
    minibatches of these lengths; None where every unit is alone already."""
    sizes = [
        len(places) * max(lengths[i] for i in places)
        for lengths in minibatches
        for places in micro_batches(lengths, max_tokens, group)
        if len(places) > group
    ]
    return (max(sizes), max(sizes) // 2) if sizes else None


def derive(seed: int, *names: object) -> int:
    """A seed in 0..2^63-1 for this purpose, e.g. ``derive(0, "rollout", step)``."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int, *names: object, state: Sequence[str] | None = None) -> Iterator[None]:
    """torch's random numbers come from this seed inside, and go on as before outside. With a ``state`` of
    ``rng_state``, taken inside earlier, they go on from there."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(derive(seed, *names))
        states = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in state or ()]
        if states:
            torch.set_rng_state(states[0])
        for device, on_gpu in zip(range(torch.cuda.device_count()), states[1:], strict=False):
            torch.cuda.set_rng_state(on_gpu, device)
        yield


def rng_state() -> list[str]:
    """torch's random state for ``seeded``, as base64: the CPU's and, once CUDA is in use, each of its devices'."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in (torch.get_rng_state(), *on_gpus)]


def endless(n: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start..start+count-1 of the endless list of passes over 0..n-1, each pass shuffled anew."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, offset = divmod(start + len(chosen), n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(derive(seed, "pass", epoch))).tolist()
        chosen += order[offset : offset + count - len(chosen)]
    return chosen
