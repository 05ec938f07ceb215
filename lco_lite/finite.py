"""Is every number one? In one pass: a sum is not finite where a term of it is not, and is three times as fast to make
as ``isfinite`` of each. Only where it is not are they looked at one by one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def witness(tensors: Iterable[Tensor]) -> Tensor:
    """A number that is finite only where all of theirs are, on their device: to be read together with others. Numbers
    whose sum, or on a GPU whose sum of squares, has no place in fp32 are too large to go on with, and count as such."""
    there = [tensor.detach() for tensor in tensors if tensor.numel() and tensor.is_floating_point()]
    if not there:
        return torch.zeros(())
    if there[0].is_cuda:
        return get_total_norm(there)  # fused over all of them
    return torch.stack([_sum(tensor) for tensor in there]).sum()


def not_finite_in(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first with a number that is not finite; None where all are."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _sum(tensor).isfinite() and not tensor.isfinite().all():
            return name
    return None


def rows_not_finite(tensor: Tensor) -> Tensor | None:
    """[T, …] -> [T]: where a row has a number that is not finite. None where all are."""
    if not tensor.is_floating_point() or _sum(tensor).isfinite():
        return None
    rows = ~tensor.isfinite().flatten(1).all(1) if tensor.dim() > 1 else ~tensor.isfinite()
    return rows if rows.any() else None


def _sum(tensor: Tensor) -> Tensor:
    """In fp32 at least; that of bfloat16 is gathered in fp32 anyway."""
    return (tensor.sum(dtype=torch.float32) if tensor.dtype == torch.float16 else tensor.sum()).to(torch.float32)
