"""How the losses walk over the tokens, and how gradients found in the forward pass reach autograd."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lco_lite.objectives.head import Head, columns_product, wide

CUDA_BYTES = 240 * 2**20  # all buffers of a chunk together
CUDA_BYTES_PER_LOGIT = 12  # z, r in fp32, and half-precision or fused temporaries
CPU_LOGITS = 6 * 2**20  # 24 MiB in fp32: enough for the products, small enough for malloc to use again
logger = logging.getLogger(__name__)
_compiled = functools.cache(torch.compile)
Values = dict[str, Tensor]  # per token, [C] or [T], detached


def chunk_size(columns: int, device: torch.device) -> int:
    """Tokens at a time, 16 to 2,048: as many as a bounded part of the free memory holds, ``columns`` numbers each."""
    if device.type != "cuda":
        return min(max(CPU_LOGITS // columns, 16), 2048)
    free = torch.cuda.mem_get_info(device)[0]
    return chunk_on_cuda(columns, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def chunk_on_cuda(columns: int, free: int) -> int:
    """``chunk_size`` where ``free`` bytes of a GPU's memory are."""
    tokens = min(CUDA_BYTES, free // 4) // (CUDA_BYTES_PER_LOGIT * columns)
    return min(max(tokens // 16 * 16, 16), 2048)


def spans(tokens: int, chunk: int | None, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover the tokens, ``chunk`` (None: ``chunk_size``) at a time."""
    chunk = chunk_size(columns, device) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    for start in range(0, tokens, chunk):
        yield slice(start, min(start + chunk, tokens))


def joined(chunks: list[Values]) -> Values:
    """[C] of each chunk -> [T]."""
    return {name: torch.cat([values[name] for values in chunks]) for name in chunks[0]}


def asks_gradient(x: Tensor | None) -> bool:
    return torch.is_grad_enabled() and x is not None and x.requires_grad


class Gradients:
    """∂L/∂hidden, ∂L/∂weight, ∂L/∂bias times ``scale``, filled by chunks: those in ``asks`` or that autograd needs."""

    def __init__(self, hidden: Tensor, head: Head, scale: float = 1.0, asks: tuple[bool, ...] | None = None) -> None:
        self.head, self.scale = head, scale
        self.inputs = (hidden, head.weight, head.bias)
        asks = asks or tuple(asks_gradient(x) for x in self.inputs)
        # fp16 cannot hold 1/V times 1/T, and sums over chunks need fp32
        kept = torch.bfloat16 if hidden.dtype == torch.bfloat16 else wide(hidden)
        summed = wide(hidden, head.weight)
        self.hidden = torch.empty_like(hidden, dtype=kept) if asks[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=summed) if asks[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=summed) if asks[2] and head.bias is not None else None
        self.all = (self.hidden, self.weight, self.bias)
        self.wanted = any(asks)

    def add(self, part: slice, grad: Tensor, logits: Tensor | None, factor: float = 1.0) -> None:
        """Take in ``factor`` · ``grad``, ∂L/∂logits [C, V] of the tokens ``part``. A soft-cap needs the ``logits``."""
        if not self.wanted:
            return
        head, hidden = self.head, self.inputs[0][part]
        factor *= self.scale * head.scale
        if head.softcap is not None:
            assert logits is not None
            grad = grad * (1 - (logits / head.softcap).square())
        if self.hidden is not None:
            self.put(part, columns_product(grad, head.vocabulary), factor)
        if self.weight is not None:
            dtype = self.weight.dtype
            self.weight[: head.rows].addmm_(grad.to(dtype).T, hidden.to(dtype), alpha=factor)
        if self.bias is not None:
            self.bias[: head.rows].add_(grad.sum(0, dtype=self.bias.dtype), alpha=factor)

    def put(self, part: slice, grad_hidden: Tensor, factor: float) -> None:
        """∂L/∂hidden of the tokens ``part`` is ``factor`` times ``grad_hidden`` [C, d]."""
        if self.hidden is not None:
            self.hidden[part] = grad_hidden.mul_(factor).to(self.hidden.dtype)

    def attach(self, value: Tensor) -> Tensor:
        """``value``, [] or [T], with these gradients of it behind it: backward is one multiplication."""
        return _Given.apply(value, self.all, *self.inputs) if self.wanted else value


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        per_row = upstream.unsqueeze(-1)
        return None, None, *(None if grad is None else grad * per_row for grad in ctx.saved_tensors)


@functools.cache
def _compiler_works() -> bool:
    """Whether torch.compile makes a working kernel on this GPU: tried once, and a failure is logged once."""
    try:
        torch.compile(lambda x: (x + 1).sum(-1))(torch.zeros(4, 4, device="cuda"))
    except Exception as error:  # the compiler's dependencies fail in many ways (no C compiler, no Triton, old GPU)
        logger.warning("torch.compile does not work here, so the losses run eagerly: %s", error)
        return False
    return True


def fused(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, element-wise work, compiled into few kernels on a GPU."""
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in args)
    return (_compiled(function) if on_gpu and _compiler_works() else function)(*args)
