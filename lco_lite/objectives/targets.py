"""What the policy is pulled towards, z* = z_base + A/β (eq 7), kept as hidden states: no logits are stored.

Legend: T tokens, V vocabulary, d hidden width of the policy, d_r of the reward model, h final hidden states,
W policy head, W_r the head that the advantage goes through, β temperature, λ anchor.

z_base is z_old, or with an anchor (1−λ) z_old + λ z_ref where z_ref is the policy before RL: our own addition, with
which refreshes of π_old converge to z_ref + A/(λβ) instead of multiplying the advantage in once more each time.

The residual of linear heads is r = z* − z_θ = W·u + A/β with u = (h_old − h_θ) + λ (h_ref − h_old) formed in fp32
or wider, so that no two large logits are ever subtracted. While h_θ = h_old and λ = 0, u is exactly 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lco_lite.objectives.head import Head, gram, wide

AnyTarget = TypeVar("AnyTarget", bound="Target")


class Target:
    """What both kinds of target share. Per-token tensors may be kept on the CPU: select a minibatch, then ``to``."""

    PER_TOKEN: ClassVar[tuple[str, ...]]
    HEADS: ClassVar[tuple[str, ...]]

    old: Tensor
    beta: float
    anchor: float
    reference: Tensor | None
    old_head: Head | None
    reference_head: Head | None

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.anchor <= 1:
            raise ValueError(f"anchor must be in 0..1, got {self.anchor}")
        if self.anchor and self.reference is None:
            raise ValueError("an anchor needs `reference`, the hidden states of the policy before RL")
        for name in self.PER_TOKEN:
            tensor = getattr(self, name)
            if tensor is not None and len(tensor) != len(self):
                raise ValueError(f"{name} has {len(tensor)} tokens, old has {len(self)}")

    def __len__(self) -> int:
        return self.old.shape[0]

    def select(self: AnyTarget, index: Tensor | slice) -> AnyTarget:
        """The target of some of the tokens: an index tensor, a boolean mask or a slice over T."""
        return self._map(self.PER_TOKEN, lambda tensor: tensor[index])

    __getitem__ = select

    def to(self: AnyTarget, device: torch.device | str) -> AnyTarget:
        """The same target with its per-token tensors on ``device``; heads stay where their models are."""
        return self._map(self.PER_TOKEN, lambda tensor: tensor.to(device, non_blocking=True))

    def common_rows(self, head: Head) -> int:
        """Tokens that every head has: heads of one tokenizer differ in padding rows only."""
        return min([head.rows, *(h.rows for name in self.HEADS if (h := getattr(self, name)) is not None)])

    def restrict(self: AnyTarget, rows: int) -> AnyTarget:
        """The same target over the first ``rows`` tokens of the vocabulary."""
        return self._map(self.HEADS, lambda head: head.prefix(rows))

    def check_heads(self, head: Head) -> None:
        """Refuse a trained ``head`` where z_old or z_ref would move with it. Raises ValueError."""
        if head.is_trained and self.old_head is None:
            raise ValueError("the head is trained: give the target `old_head`, a frozen() copy made with `old`")
        if head.is_trained and self.anchor and self.reference_head is None:
            raise ValueError("the head is trained: an anchored target needs `reference_head`, frozen before RL")

    def drift(self, hidden: Tensor, head: Head) -> Tensor:
        """u = (h_old − h_θ) + λ (h_ref − h_old), [T, d]."""
        dtype = wide(hidden, self.old, head.weight)
        old = self.old.to(dtype)
        u = old - hidden.to(dtype)
        if self.reference is not None and self.anchor:
            u += self.anchor * (self.reference.to(dtype) - old)
        return u

    def old_logits(self, head: Head) -> Tensor:
        """z_old, [T, V]."""
        return (self.old_head or head).logits(self.old)

    def base_logits(self, head: Head) -> Tensor:
        """z_base = (1−λ) z_old + λ z_ref, [T, V]."""
        z = self.old_logits(head)
        if self.reference is not None and self.anchor:
            z = z + self.anchor * ((self.reference_head or head).logits(self.reference) - z)
        return z

    def drifts_linearly(self, head: Head) -> bool:
        """True where z_base − z_θ is W·u."""
        return head.is_linear and self.old_head is None and self.reference_head is None

    def gap(self, hidden: Tensor, head: Head, logits: Tensor | None) -> Tensor:
        """z_base − z_θ, [T, V]: the residual without the advantage. ``logits``: z_θ where they are at hand."""
        if not self.drifts_linearly(head):
            return self.base_logits(head) - (head.logits(hidden) if logits is None else logits)
        u = self.drift(hidden, head)
        if not u.any():  # the first update of a phase: one product fewer
            return u.new_zeros(len(u), head.rows)
        return head.project(u)

    def is_hidden(self, head: Head) -> bool:
        """True where the whole residual is a linear function of hidden states."""
        return self.drifts_linearly(head)

    def _map(self: AnyTarget, names: tuple[str, ...], change: Callable[[Any], Any]) -> AnyTarget:
        present = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: change(value) for name, value in present.items()})  # type: ignore[type-var]


@dataclass(eq=False)
class DenseTarget(Target):
    """A(a) = log φ_DPO(a) − log φ_ref(a) for every token a (eq 13), from hidden states of the reward model.

    ``old`` [T, d]: h_old. ``shift`` [T, d_r]: h_dpo − h_ref, subtracted in fp32 (bf16 is enough to keep it).
    ``shift_head``: the reward model's head, or its weight [V, d_r], where it is not the policy's.
    ``anchor`` λ with ``reference`` [T, d]: h of the policy before RL.

    The log-partition functions of φ_DPO and φ_ref are constants over V: they cancel, so A/β is W_r·shift/β centred.

    Where differences of hidden states are not enough, more is needed and its absence is an error: ``old_head`` and
    ``reference_head`` (frozen copies) and ``shift_head`` with a trained policy head; ``shift_base`` [T, d_r] = h_ref
    of the reward model with a soft-capped one.
    """

    old: Tensor
    shift: Tensor
    beta: float
    shift_head: Head | Tensor | None = None
    anchor: float = 0.0
    reference: Tensor | None = None
    old_head: Head | None = None
    reference_head: Head | None = None
    shift_base: Tensor | None = None

    PER_TOKEN = ("old", "shift", "reference", "shift_base")
    HEADS = ("shift_head", "old_head", "reference_head")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.shift_head, Tensor):
            self.shift_head = Head(self.shift_head)

    def check_heads(self, head: Head) -> None:
        super().check_heads(head)
        if head.is_trained and self.shift_head is None:
            raise ValueError("the head is trained: give the target `shift_head`, the reward model's own head")
        if self.through(head).is_trained:
            raise ValueError("the head of the reward model must be frozen")
        if self.through(head).softcap is not None and self.shift_base is None:
            raise ValueError("the reward model's head is soft-capped: give the target `shift_base`, its h_ref")

    def through(self, head: Head) -> Head:
        """The head that the advantage goes through."""
        own = self.shift_head if isinstance(self.shift_head, Head) else head
        return head if own.same_as(head) else own

    def is_hidden(self, head: Head) -> bool:
        return super().is_hidden(head) and self.through(head).softcap is None

    def step(self, head: Head, standardise: bool) -> Tensor:
        """v = shift/β, [T, d_r], so that A/β is W_r·v centred; divided by the deviation of A over V where asked."""
        through = self.through(head)
        shift = self.shift.to(wide(self.shift, through.weight))
        if standardise:
            variance = (shift @ gram(through).covariance * shift).sum(-1, keepdim=True)
            shift = shift * inverse_root(variance) / through.scale
        return shift / self.beta

    def advantages(self, head: Head, standardise: bool) -> Tensor:
        """A/β centred, [T, V], for heads of any kind; standardised where asked."""
        through = self.through(head)
        if through.softcap is None:
            a = through.project(self.shift.to(wide(self.shift, through.weight)))
        else:
            base = self.shift_base.to(wide(self.shift, through.weight))  # type: ignore[union-attr]
            a = through.logits(base + self.shift) - through.logits(base)
        a -= a.mean(-1, keepdim=True)
        if standardise:
            a *= inverse_root(a.square().mean(-1, keepdim=True))
        return a / self.beta

    def residual(self, hidden: Tensor, head: Head, logits: Tensor | None, standardise: bool) -> tuple[Tensor, Tensor]:
        """r = z* − z_θ before A is centred, [T, V], and the mean of A/β over V to take off it, [T, 1].

        ``logits``: z_θ where they are at hand.
        """
        if not self.is_hidden(head):
            r = self.gap(hidden, head, logits).add_(self.advantages(head, standardise))
            return r, r.new_zeros(len(r), 1)
        through, v = self.through(head), self.step(head, standardise)
        mean = through.scale * (v @ through.mean_row.to(v.dtype)).unsqueeze(-1)
        if through is head:
            return head.project(self.drift(hidden, head) + v), mean
        return self.gap(hidden, head, logits).add_(through.project(v)), mean

    def mean_square(self, hidden: Tensor, head: Head, standardise: bool) -> tuple[Tensor, Tensor]:
        """Mean over V of r², [T], and its gradient with respect to ``hidden`` [T, d], where ``is_hidden``."""
        through, u = self.through(head), head.scale * self.drift(hidden, head)
        v = through.scale * self.step(head, standardise).to(u.dtype)
        if through is head:
            w, covariance = u + v, gram(head).covariance
        else:
            w, covariance = torch.cat([u, v], dim=-1), gram(head, through).covariance
        mean_row = head.mean_row.to(u.dtype)
        mean, slope = u @ mean_row, w @ covariance.to(u.dtype)
        grad = torch.outer(mean, mean_row).add_(slope[:, : u.shape[1]])
        return mean.square() + (w * slope).sum(-1), grad.mul_(-2 * head.scale)


@dataclass(eq=False)
class SparseTarget(Target):
    """A at the sampled action, 0 elsewhere (eq 11).

    ``old`` [T, d]: h_old. ``actions`` [T]: token ids. ``advantages`` [T]. ``anchor``, ``reference``: as for the dense
    target; ``old_head`` and ``reference_head``: frozen copies, needed with a trained head.

    As in section 4.4 the vector is centred per token like a dense one: A(a) − A(a)/V at the action and −A(a)/V
    elsewhere. LCO-KLD does not see the difference; LCO-MSE and LCO-LCH do.
    """

    old: Tensor
    actions: Tensor
    advantages: Tensor
    beta: float
    anchor: float = 0.0
    reference: Tensor | None = None
    old_head: Head | None = None
    reference_head: Head | None = None

    PER_TOKEN = ("old", "actions", "advantages", "reference")
    HEADS = ("old_head", "reference_head")

    def tilt(self, like: Tensor) -> Tensor:
        """A/β, [T, 1], in the type of ``like``."""
        return (self.advantages.to(like.dtype) / self.beta).unsqueeze(-1)

    def residual(self, hidden: Tensor, head: Head, logits: Tensor | None, standardise: bool) -> tuple[Tensor, Tensor]:
        """r = z* − z_θ before A is centred, [T, V], and the mean of A/β over V to take off it, [T, 1].

        ``logits``: z_θ where they are at hand. There is nothing to standardise.
        """
        r = self.gap(hidden, head, logits)
        tilt = self.tilt(r)
        return r.scatter_add_(-1, self.actions.unsqueeze(-1), tilt), tilt / head.rows

    def mean_square(self, hidden: Tensor, head: Head, standardise: bool) -> tuple[Tensor, Tensor]:
        """Mean over V of r², [T], and its gradient with respect to ``hidden`` [T, d], where ``is_hidden``.

        As for the dense target with u alone, and a rank-one term for the action: x = A/β on its row w_a.
        """
        u = head.scale * self.drift(hidden, head)
        mean_row, covariance = head.mean_row.to(u.dtype), gram(head).covariance.to(u.dtype)
        x = self.tilt(u)
        mean, slope = u @ mean_row, u @ covariance
        action = (head.vocabulary[self.actions].to(u.dtype) - mean_row).mul_(x / head.rows)
        own = (x.square() * (1 - 1 / head.rows) / head.rows).squeeze(-1)
        loss = mean.square() + (u * (slope + 2 * action)).sum(-1) + own
        grad = torch.outer(mean, mean_row).add_(slope).add_(action)
        return loss, grad.mul_(-2 * head.scale)


def inverse_root(variance: Tensor) -> Tensor:
    """1/sqrt, and 0 where there is no variance: an advantage of zero stays zero."""
    return torch.where(variance > 0, variance.rsqrt(), 0.0)
