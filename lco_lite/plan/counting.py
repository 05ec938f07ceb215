"""What lives: a counter of storages, and the parts that a phase's peak is made of."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = "meta"  # the device of fake tensors that stands in for a card


class LiveBytes(TorchDispatchMode):
    """``now``: bytes of the storages on ``device`` that live, of those made inside; ``peak``: the most since
    ``restart``, ``chunks`` of them in tensors over the ``vocabulary``; ``host``: of a card's trial what lives in host
    memory. A number read from a fake tensor is 1, a truth False."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device, self.vocabulary = device, 0
        self.now = self.peak = self.chunks = self.host = self._wide = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> None:
        gc.collect()
        self.peak, self.chunks = self.now, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) or (isinstance(tensor, Tensor) and tensor.device.type != CARD):
                self.add(tensor)
        if "gemm_4bit" in str(func):  # the weight in 16 bits, inside the product
            self._reach(self.now + math.prod(args[2]) * out.element_size())
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds
        if tensor.device.type != self.device:
            change, sizes = self._change_host, (size,)
        else:
            wide = tensor.dim() == 2 and tensor.shape[1] >= self.vocabulary > 0
            change, sizes = self._change, (size, size * wide)
        weakref.finalize(storage, change, *(-n for n in sizes))
        change(*sizes)

    def _change(self, size: int, wide: int) -> None:
        self.now, self._wide = self.now + size, self._wide + wide
        self._reach(self.now)

    def _change_host(self, size: int) -> None:
        self.host += size

    def _reach(self, size: int) -> None:
        if size > self.peak:
            self.peak, self.chunks = size, self._wide


@dataclass(frozen=True)
class Part:
    """Bytes in a model cut down to ``layers`` of its ``of``."""

    column: str
    bytes: float
    layers: int
    of: int


@dataclass(frozen=True)
class Moment:
    """A phase's peak: ``parts`` make it up; ``chunks`` of its activations are buffers of the loss at any depth."""

    phase: str
    parts: list[Part]
    chunks: float


@contextlib.contextmanager
def standing_in(owner: Any, name: str, value: Any) -> Iterator[None]:
    """What a fake tensor cannot go through, or a card would do otherwise, for the length of the block."""
    own = getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
