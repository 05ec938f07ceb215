"""The LM head as the losses see it: hidden states in, logits out, and gradients back."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

ROW_BLOCK = 8192  # rows of the weight upcast at a time: 8192 x 2048 in fp32 is 64 MiB
BIAS_COLUMNS = 8  # of a bias among the columns of the weight, the others 0: GPUs are slow where a width is odd
FP16_TOP = 2.0**14  # rows are scaled to this largest entry before they are rounded to fp16, whose range is small
MM_WIDENS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)  # torch.mm takes out_dtype on CUDA


@dataclass(eq=False, frozen=True)
class Head:
    """logits = softcap(scale * (hidden @ weight.T + bias)), only over the first ``rows`` rows: the others are padding.

    ``weight`` [>= rows, d]; ``bias`` [>= rows] or None; ``scale`` as in Cohere (``logit_scale``) and Granite
    (1 / ``logits_scaling``); ``softcap`` c gives c * tanh(logits / c), as in Gemma 2. Make one Head for a model and
    keep it: it remembers the moments of its weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int = 0  # 0: all of them
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", self.weight.shape[0])
        if not 0 < self.rows <= self.weight.shape[0]:
            raise ValueError(f"rows must be in 1..{self.weight.shape[0]}, got {self.rows}")

    @property
    def vocabulary(self) -> Tensor:
        """The rows that are tokens, [V, d]: a view."""
        return self.weight[: self.rows]

    def same_as(self, other: "Head") -> bool:
        """True where both are the very same weights used in the same way."""
        mine, theirs = ((h.scale, h.softcap, h.rows) for h in (self, other))
        return self.weight is other.weight and self.bias is other.bias and mine == theirs

    @property
    def is_trained(self) -> bool:
        """True where a gradient must reach the head itself."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @property
    def is_linear(self) -> bool:
        """True where differences of logits are a fixed linear function of those of hidden states: a bias cancels."""
        return self.softcap is None and not self.is_trained

    def prefix(self, rows: int) -> "Head":
        """The same head over its first ``rows`` tokens; the same object each time, so that what it remembers stays."""
        return self if rows == self.rows else self.remember(("prefix", rows), lambda: replace(self, rows=rows))

    def on(self, device: torch.device) -> "Head":
        """The same head there; a copy where it is elsewhere, made once: of weights that are not trained."""
        if self.weight.device == device:
            return self
        bias = None if self.bias is None else self.bias.to(device)
        return self.remember(("on", device), lambda: replace(self, weight=self.weight.to(device), bias=bias))

    def with_bias_as_column(self) -> "Head":
        """The same logits of hidden states that have a 1 and zeros behind them, ``BIAS_COLUMNS`` in all: a linear
        function of those, bias and all. A copy of the weight, made once."""

        bias, version = self.bias, self.weight._version
        if bias is None:
            return self

        def widened() -> "Head":
            more = self.weight.new_zeros(len(self.weight), BIAS_COLUMNS)
            more[:, 0] = bias
            return replace(self, weight=torch.cat([self.weight.detach(), more], dim=-1), bias=None)

        return self.remember(("widened", version), widened)

    def frozen(self) -> "Head":
        """A detached copy: what a trained head was when π_old acted."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, d] -> [T, V] in fp32, or wider as the inputs are. For a chunk of tokens, never a whole sequence."""
        z = self.project(hidden)
        if self.bias is not None:
            z = z + self.scale * self.bias[: self.rows]
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def project(self, difference: Tensor) -> Tensor:
        """Logits of a difference of hidden states, [T, d] -> [T, V]: no bias, no soft-cap."""
        z = rows_product(difference, self.vocabulary)
        return z if self.scale == 1 else z.mul_(self.scale)  # not the half-precision input, which would be rounded

    @property
    def operand_dtype(self) -> torch.dtype:
        """The type in which a gradient [T, V] is best handed to the product with the weight."""
        return torch.bfloat16 if self.weight.is_cuda and self.weight.dtype == torch.bfloat16 else wide(self.weight)

    @property
    def mean_row(self) -> Tensor:
        """w̄ [d], the mean over V of the rows, in fp32 or fp64: mean over V of W·x is w̄·x."""

        def mean() -> Tensor:
            exact = torch.float32 if self.weight.device.type == "mps" else torch.float64  # which has no other
            total = self.weight.new_zeros(self.weight.shape[1], dtype=exact)
            for block in self.vocabulary.split(ROW_BLOCK):
                total += block.to(wide(block)).sum(0, dtype=exact)
            return (total / self.rows).to(wide(self.weight))

        return self.remember(("mean", self.weight._version), mean)

    def remember(self, key: Any, compute: Any) -> Any:
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = compute()
        return self._cache[key]


def wide(*tensors: Tensor) -> torch.dtype:
    """The type to accumulate in: fp32, or fp64 where an input is."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, [T, d] -> [T, V], in fp32 at least: where the GPU cannot, the weight is upcast block by block."""
    if (product := _unblocked_product(x, weight.T)) is not None:
        return product
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=wide(x, weight))
    for start in range(0, len(weight), ROW_BLOCK):
        part = slice(start, start + ROW_BLOCK)
        out[:, part] = x.to(out.dtype) @ weight[part].to(out.dtype).T
    return out


def columns_product(grad: Tensor, weight: Tensor) -> Tensor:
    """grad @ weight, [T, V] -> [T, d]; types as in ``rows_product``."""
    if (product := _unblocked_product(grad, weight)) is not None:
        return product
    out = grad.new_zeros(grad.shape[0], weight.shape[1], dtype=wide(grad, weight))
    for part, block in zip(grad.split(ROW_BLOCK, dim=-1), weight.split(ROW_BLOCK), strict=True):
        out += part.to(out.dtype) @ block.to(out.dtype)
    return out


def _unblocked_product(x: Tensor, matrix: Tensor) -> Tensor | None:
    """x @ matrix where ``matrix`` need not be upcast: the GPU multiplies operands of the matrix's type into fp32."""
    out_type = wide(x, matrix)
    if matrix.dtype == out_type:
        return x.to(out_type) @ matrix
    differentiated = torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad)
    if differentiated or not (MM_WIDENS and matrix.is_cuda and out_type == torch.float32):
        return None  # autograd does not go through out_dtype
    if matrix.dtype == torch.bfloat16 or x.dtype == torch.float16:
        return torch.mm(x.to(matrix.dtype), matrix, out_dtype=torch.float32)
    gain = FP16_TOP / x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return torch.mm((gain * x).half(), matrix, out_dtype=torch.float32) / gain


def row_covariance(head: Head, *others: Head) -> Tensor:
    """Σ, the covariance over V of the rows of ``head`` with those of ``others`` beside them, [Σd, Σd]. Kept."""
    heads = (head, *others)
    dtype = wide(*(h.weight for h in heads))

    def compute() -> tuple[Tensor, tuple[Head, ...]]:
        mean = torch.cat([h.mean_row.to(dtype) for h in heads])
        total = mean.new_zeros(len(mean), len(mean))
        for blocks in zip(*(h.vocabulary.split(ROW_BLOCK) for h in heads), strict=True):
            rows = torch.cat([block.to(dtype) for block in blocks], dim=-1) - mean
            total += rows.T @ rows
        return total / head.rows, heads  # the heads are kept alive, so that their ids name them

    return head.remember(("covariance", *((id(h), h.weight._version) for h in heads)), compute)[0]
