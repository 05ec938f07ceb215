"""What lives: a counter of storages, by what they are and of which model, on the device and in host memory."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from inspect import getattr_static
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = "meta"  # the device of fake tensors that stands in for a card


class Tag(NamedTuple):
    """A column of the table, and the model whose depth it grows with; None: with none."""

    column: str
    model: int | None = None


LOSS = Tag("loss")


class Held:
    """Bytes that live in one memory: ``now``, the most since ``restart``, and what those were (``at_peak``)."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.tags, self.at_peak = Counter[Tag](), Counter[Tag]()

    def restart(self) -> None:
        self.peak, self.at_peak = self.now, self.tags.copy()

    def change(self, size: int, tag: Tag) -> None:
        self.now += size
        self.tags[tag] += size
        self.reach(self.now)

    def of(self, column: str) -> int:
        return sum(size for tag, size in self.tags.items() if tag.column == column)

    def reach(self, size: int) -> None:
        if size > self.peak:
            self.peak, self.at_peak = size, self.tags.copy()


class Record:
    """A storage, in its memory: on a device its size is rounded as CUDA's allocator does."""

    def __init__(self, held: Held, tag: Tag, unit: int) -> None:
        self.held, self.tag, self.unit, self.size = held, tag, unit, 0

    def resize(self, size: int) -> None:
        size, before = -(-size // self.unit) * self.unit, self.size
        self.size = size
        self.held.change(size - before, self.tag)


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside: ``here``, those on ``device``; ``host``, of a card's trial those on the CPU.

    Buffers as wide as the ``vocabulary`` are the loss's; all else is what ``tagged`` says. A number read from a fake
    tensor is 1, a truth False.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device, self.vocabulary, self.tag = device, 0, Tag("activations")
        self.here, self.host = Held(), Held()
        self._records: weakref.WeakKeyDictionary[Any, Record] = weakref.WeakKeyDictionary()

    def restart(self) -> None:
        gc.collect()
        self.here.restart()
        self.host.restart()

    @contextlib.contextmanager
    def tagged(self, tag: Tag) -> Iterator[None]:
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) or (isinstance(tensor, Tensor) and tensor.device.type != CARD):
                self.add(tensor)
        if "gemm_4bit" in str(func):  # the weight in 16 bits, inside the product
            self.here.reach(self.here.now + math.prod(args[2]) * out.element_size())
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._records:
            return
        wide = tensor.dim() == 2 and tensor.shape[1] >= self.vocabulary > 0
        tag = LOSS if wide and self.tag.column == "activations" else self.tag
        is_here = tensor.device.type == self.device
        record = Record(self.here, tag, 512) if is_here else Record(self.host, tag, 1)
        self._records[storage] = record
        weakref.finalize(storage, record.resize, 0)
        record.resize(storage.nbytes())

    def tag_of(self, tensor: Tensor) -> Tag:
        return self._records[tensor.untyped_storage()].tag

    def resizing(self) -> Callable[[Any, int], Any]:
        """In place of the storages' own ``resize_``: a fake one that is counted is only counted otherwise."""
        own = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            record = self._records.get(storage)
            return own(storage, size) if record is None else record.resize(size)

        return resize


@contextlib.contextmanager
def standing_in(owner: Any, name: str, value: Any) -> Iterator[None]:
    """What a fake tensor cannot go through, or a card would do otherwise, for the length of the block."""
    own = getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
