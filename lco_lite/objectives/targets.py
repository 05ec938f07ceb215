"""What the policy is pulled towards, z* = z_base + A/β (eq 7), kept as hidden states: no logits are stored.

W_r is the head that the advantage goes through. z_base is z_old, or with an anchor λ (1−λ) z_old + λ z_ref, the policy
before RL. The residual of linear heads is r = z* − z_θ = W·u + A/β with u = (h_old − h_θ) + λ (h_ref − h_old): see
docs/hidden-space.md.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from lco_lite.objectives.head import Head, row_covariance, wide


@dataclass(eq=False)
class Target:
    """What all kinds of target share: ``target[index]`` is that of some tokens (indices, a mask or a slice over T).

    ``old`` [T, d]: h_old. ``anchor`` λ with ``reference`` [T, d]: h of the policy before RL. ``old_head`` and
    ``reference_head``: frozen copies, needed with a trained head. Every tensor is per token and may be kept on the CPU.
    """

    old: Tensor
    beta: float
    _: KW_ONLY
    anchor: float = 0.0
    reference: Tensor | None = None
    old_head: Head | None = None
    reference_head: Head | None = None

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.anchor <= 1:
            raise ValueError(f"anchor must be in 0..1, got {self.anchor}")
        if self.anchor and self.reference is None:
            raise ValueError("an anchor needs `reference`, the hidden states of the policy before RL")
        for name, tensor in self._all(Tensor).items():
            if len(tensor) != len(self):
                raise ValueError(f"{name} has {len(tensor)} tokens, old has {len(self)}")

    def __len__(self) -> int:
        return len(self.old)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return self._map(Tensor, lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> Self:
        """Heads stay where their models are."""
        return self._map(Tensor, lambda tensor: tensor.to(device))

    def fit(self, head: Head) -> tuple[Head, Self]:
        """``head`` and target over the tokens that every head has: heads of one tokenizer differ in padding rows only.

        Raises ValueError for a trained ``head`` where z_old or z_ref would move with it.
        """
        if head.is_trained and self.old_head is None:
            raise ValueError("the head is trained: give the target `old_head`, a frozen() copy made with `old`")
        if head.is_trained and self.anchor and self.reference_head is None:
            raise ValueError("the head is trained: an anchored target needs `reference_head`, frozen before RL")
        rows = min(h.rows for h in (head, *self._all(Head).values()))
        return head.prefix(rows), self._map(Head, lambda h: h.prefix(rows))

    def is_hidden(self, head: Head) -> bool:
        """True where the whole residual is a linear function of hidden states."""
        return head.is_linear and self.old_head is None and self.reference_head is None

    def drift(self, hidden: Tensor, head: Head) -> Tensor:
        """u = (h_old − h_θ) + λ (h_ref − h_old), [T, d]."""
        dtype = wide(hidden, self.old, head.weight)
        old = self.old.to(dtype)
        u = old - hidden.to(dtype)
        if self.reference is not None and self.anchor:
            u += self.anchor * (self.reference.to(dtype) - old)
        return u

    def old_logits(self, head: Head) -> Tensor:
        return (self.old_head or head).logits(self.old)

    def gap(self, hidden: Tensor, head: Head, logits: Tensor | None) -> Tensor:
        """z_base − z_θ, [T, V]: the residual without the advantage. ``logits``: z_θ where it is formed already."""
        if Target.is_hidden(self, head):  # the advantage plays no part here
            u = self.drift(hidden, head)
            return head.project(u) if u.any() else u.new_zeros(len(u), head.rows)  # zero at a phase's first update
        z = self.old_logits(head)
        if self.reference is not None and self.anchor:
            z = z + self.anchor * ((self.reference_head or head).logits(self.reference) - z)
        return z - (head.logits(hidden) if logits is None else logits)

    def _all(self, kind: type) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, kind)}

    def _map(self, kind: type, change: Callable[[Any], Any]) -> Self:
        return replace(self, **{name: change(x) for name, x in self._all(kind).items()})


@dataclass(eq=False)
class DenseTarget(Target):
    """A(a) = log φ_DPO(a) − log φ_ref(a) for every token a (eq 13), from hidden states of the reward model.

    ``shift`` [T, d_r]: h_dpo − h_ref, subtracted in fp32 (bf16 is enough to keep it). ``shift_head``: the reward
    model's head where it is not the policy's; it is needed with a trained one. ``shift_base`` [T, d_r]: h_ref of a
    reward model whose head is soft-capped. The log-partition functions cancel: A/β is W_r·shift/β centred. log φ alone
    (eq 12) is a shift from 0, with the bias in it: ``log_phi_shift`` in feedback/advantages.py.
    """

    shift: Tensor
    shift_head: Head | None = None
    shift_base: Tensor | None = None

    def fit(self, head: Head) -> tuple[Head, Self]:
        if head.is_trained and self.shift_head is None:
            raise ValueError("the head is trained: give the target `shift_head`, the reward model's own head")
        if self.through(head).is_trained:
            raise ValueError("the head of the reward model must be frozen")
        if self.through(head).softcap is not None and self.shift_base is None:
            raise ValueError("the reward model's head is soft-capped: give the target `shift_base`, its h_ref")
        return super().fit(head)

    def through(self, head: Head) -> Head:
        """The head that the advantage goes through: ``head`` itself where the reward model's is the same."""
        return head if self.shift_head is None or self.shift_head.same_as(head) else self.shift_head

    def is_hidden(self, head: Head) -> bool:
        return super().is_hidden(head) and self.through(head).softcap is None

    def step(self, head: Head, standardise: bool) -> Tensor:
        """v = shift/β, [T, d_r], so that A/β is W_r·v centred; divided by the deviation of A over V where asked."""
        through = self.through(head)
        shift = self.shift.to(wide(self.shift, through.weight))
        if standardise:
            variance = (shift @ row_covariance(through) * shift).sum(-1, keepdim=True)
            shift = shift * inverse_root(variance) / through.scale
        return shift / self.beta

    def residual(self, hidden: Tensor, head: Head, logits: Tensor | None, standardise: bool) -> tuple[Tensor, Tensor]:
        """r = z* − z_θ before A is centred, [T, V], and the mean of A/β over V to take off it, [T, 1]."""
        through = self.through(head)
        if self.is_hidden(head):
            v = self.step(head, standardise)
            mean = through.scale * (v @ through.mean_row.to(v.dtype)).unsqueeze(-1)
            if through is head:
                return head.project(self.drift(hidden, head) + v), mean
            return self.gap(hidden, head, logits).add_(through.project(v)), mean
        if self.shift_base is None or through.softcap is None:
            a = through.project(self.shift.to(wide(self.shift, through.weight)))
        else:
            base = self.shift_base.to(wide(self.shift, through.weight))
            a = through.logits(base + self.shift) - through.logits(base)
        a -= a.mean(-1, keepdim=True)
        if standardise:
            a *= inverse_root(a.square().mean(-1, keepdim=True))
        r = self.gap(hidden, head, logits).add_(a / self.beta)
        return r, r.new_zeros(len(r), 1)


@dataclass(eq=False)
class SparseTarget(Target):
    """A at the sampled action, 0 elsewhere (eq 11), centred like a dense one; ``actions`` are token ids. Both [T]."""

    actions: Tensor
    advantages: Tensor

    def tilt(self, like: Tensor) -> Tensor:
        return (self.advantages.to(like.dtype) / self.beta).unsqueeze(-1)

    def residual(self, hidden: Tensor, head: Head, logits: Tensor | None, standardise: bool) -> tuple[Tensor, Tensor]:
        r = self.gap(hidden, head, logits)
        return self.tilted(r, r.new_zeros(len(r), 1))

    def tilted(self, residual: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """``residual`` [T, V], which is overwritten, and ``mean`` [T, 1] with A/β at the actions in them."""
        tilt = self.tilt(residual)
        return residual.scatter_add_(-1, self.actions.unsqueeze(-1), tilt), mean + tilt / residual.shape[-1]


@dataclass(eq=False)
class MixedTarget(DenseTarget, SparseTarget):
    """z* = z_base + A_dense/β + A_sparse/β: a dense advantage, and at the sampled action a sparse one on top of it.

    ``standardise`` is of the dense part alone.
    """

    def residual(self, hidden: Tensor, head: Head, logits: Tensor | None, standardise: bool) -> tuple[Tensor, Tensor]:
        return self.tilted(*super().residual(hidden, head, logits, standardise))


def inverse_root(variance: Tensor) -> Tensor:
    """1/sqrt, and 0 where there is no variance: an advantage of zero stays zero."""
    return torch.where(variance > 0, variance.rsqrt(), 0.0)
