"""The LM head as the losses see it: hidden states in, logits out.

Legend: V vocabulary, d hidden width, T tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Head:
    """logits = softcap(scale * (hidden @ weight.T + bias)), only over the first ``rows`` rows of ``weight``.

    ``weight`` [>= rows, d]; ``bias`` [>= rows] or None; ``scale`` as in Cohere (``logit_scale``) and Granite
    (1 / ``logits_scaling``); ``softcap`` c gives c * tanh(logits / c), as in Gemma 2. Rows past ``rows`` pad the
    matrix and are no tokens.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None
    _gram: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = self.weight.shape[0]
        if not 0 < self.rows <= self.weight.shape[0]:
            raise ValueError(f"rows must be in 1..{self.weight.shape[0]}, got {self.rows}")

    @property
    def vocabulary(self) -> Tensor:
        """The rows that are tokens, [V, d]: a view."""
        return self.weight[: self.rows]

    @property
    def is_linear(self) -> bool:
        """True where logits are a linear function of hidden states with nothing to train: the hidden-space path."""
        return self.bias is None and self.softcap is None and not self.weight.requires_grad

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, d] -> [T, V] in the promoted type of fp32 and the inputs. For a chunk of tokens, never a whole sequence."""
        z = (hidden @ self.vocabulary.to(hidden.dtype).T).to(torch.promote_types(hidden.dtype, torch.float32))
        if self.bias is not None:
            z = z + self.bias[: self.rows]
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
