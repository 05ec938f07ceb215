"""Random problems for the loss tests, each with its target on plain logits computed the long way, in float64.

Legend: T tokens, V vocabulary, d and d_r hidden widths.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lco_lite.objectives import reference
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import AnyTarget
from lco_lite.objectives.targets import DenseTarget, MixedTarget, SparseTarget

KINDS = ("dense", "sparse", "mixed")


@dataclass
class Case:
    """A problem, and the oracle's view of it: logits over the common vocabulary as a function of hidden and head."""

    head: Head
    hidden: Tensor
    target: AnyTarget
    actions: Tensor
    rows: int
    old_logits: Tensor
    target_logits: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        trained = [self.head.weight, self.head.bias] if self.head.is_trained else []
        return [self.hidden, *(x for x in trained if x is not None)]

    def logits(self) -> Tensor:
        return self.head.logits(self.hidden)[:, : self.rows]

    def exact(self, objective: str, weighting: str) -> Tensor:
        """The loss of each token by the reference functions, differentiable."""
        if objective == "kld":
            return reference.kld(self.logits(), self.target_logits)
        loss = {"lch": reference.lch, "mse": reference.mse}[objective]
        return loss(self.logits(), self.target_logits, weighting, self.old_logits)


def make_case(
    seed: int = 0,
    kind: str = "dense",
    tokens: int = 5,
    width: int = 4,
    vocabulary: int = 9,
    beta: float = 1.0,
    padding: int = 0,
    own_head: bool = False,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    trained: bool = False,
    anchor: float = 0.0,
    standardise: bool = False,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.0,
) -> Case:
    """Hidden states and weights are drawn, and rounded to ``dtype``, before the oracle sees them in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def head_of(width: int, rows: int, pad: int) -> Head:
        weight = normal(rows + pad, width)
        weight[rows:] = torch.nan  # nothing may depend on padding
        return Head(weight, normal(rows + pad) if bias else None, scale, softcap, rows)

    head = head_of(width, vocabulary, padding)
    frozen = head.frozen()
    own = head_of(width + 2, vocabulary - 2, padding + 1) if own_head or trained else None
    through = own or frozen
    rows = vocabulary if kind == "sparse" else through.rows
    hidden, old, before = normal(tokens, width), normal(tokens, width), normal(tokens, width)
    base = normal(tokens, through.weight.shape[1])
    shift = normal(tokens, through.weight.shape[1], size=spread)
    actions = torch.randint(rows, (tokens,), generator=generator)
    base_of: dict[str, Any] = {"anchor": anchor, "reference": before}
    base_of |= {"old_head": frozen, "reference_head": frozen} if trained else {}
    sampled = normal(tokens, size=spread)
    advantages = reference.sparse_advantages(actions, sampled.double(), rows)
    target: AnyTarget = SparseTarget(old, beta, actions, sampled, **base_of)
    if kind != "sparse":
        reward, ref = (wide_logits(through, h)[:, :rows] for h in (base.double() + shift.double(), base))
        dense = torch.log_softmax(reward, -1) - torch.log_softmax(ref, -1)
        if standardise:
            dense = dense / dense.std(-1, correction=0, keepdim=True)
        mixed = {"actions": actions, "advantages": sampled, "shift": shift, "shift_head": own, "shift_base": base}
        target = MixedTarget(old, beta, **mixed, **base_of)
        advantages = advantages + dense
    if kind == "dense":
        advantages, target = dense, DenseTarget(old, beta, shift, own, base, **base_of)
    old_logits, start_logits = (wide_logits(frozen, h)[:, :rows] for h in (old, before))
    anchored = (1 - anchor) * old_logits + anchor * start_logits
    target_logits = reference.optimal_logits(anchored, advantages, beta)
    hidden.requires_grad_()
    for parameter in (head.weight, head.bias) if trained else ():
        if parameter is not None:
            parameter.requires_grad_()
    return Case(head, hidden, target, actions, rows, old_logits, target_logits)


def wide_logits(head: Head, hidden: Tensor) -> Tensor:
    """Logits in float64, whatever the types."""
    bias = None if head.bias is None else head.bias.double()
    return Head(head.weight.double(), bias, head.scale, head.softcap, head.rows).logits(hidden.double())


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    """Any case: all shapes, targets and kinds of head, unless ``fixed``."""
    drawn = {
        "seed": st.integers(0, 2**31),
        "kind": st.sampled_from(KINDS),
        "tokens": st.integers(1, 7),
        "width": st.integers(1, 6),
        "vocabulary": st.integers(4, 24),
        "beta": st.floats(0.3, 5.0),
        "padding": st.integers(0, 3),
        "own_head": st.booleans(),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, None, 4.0]),
        "scale": st.sampled_from([1.0, 0.25, 3.0]),
        "trained": st.sampled_from([False, False, True]),
        "anchor": st.sampled_from([0.0, 0.5, 1.0]),
    }
    return make_case(
        **{name: fixed[name] if name in fixed else draw(each) for name, each in drawn.items()},
        **{name: value for name, value in fixed.items() if name not in drawn},
    )  # type: ignore[arg-type]
