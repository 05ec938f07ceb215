"""What the losses may cost: so many products with the head, and no tensor larger than a chunk of tokens times V."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from objective_cases import KINDS, Case, make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lco_lite.objectives.chunks import chunk_size, spans
from lco_lite.objectives.head import row_covariance
from lco_lite.objectives.lco import OBJECTIVES, WEIGHTINGS, lco_loss
from lco_lite.objectives.logprobs import token_logprobs

T, D, V = 64, 8, 640
SHAPE = {"tokens": T, "width": D, "vocabulary": V, "dtype": torch.float32}


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes; a view of an input is none."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, x.numel())
        return out


def products(call: Callable[[], Any]) -> float:
    """How many matrix products of T·V·d the call makes."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (2 * T * V * D)


def loss_of(case: Case, objective: str, weighting: str = "mean", chunk: int | None = 8) -> Callable[[], Any]:
    return lambda: lco_loss(objective, case.hidden, case.head, case.target, weighting, chunk)[0].backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("objective", "weighting", "expected"),
    [("kld", "mean", 3), ("lch", "mean", 2), ("lch", "policy", 3), ("mse", "policy", 3), ("lch", "sum", 2)],
)
def test_a_loss_makes_as_many_products_as_its_floor(objective: str, weighting: str, expected: int, kind: str) -> None:
    case = make_case(kind=kind, **SHAPE)  # type: ignore[arg-type]
    assert products(loss_of(case, objective, weighting)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["mean", "sum"])
def test_mse_makes_no_product_with_the_vocabulary_once_it_has_the_covariance(kind: str, weighting: str) -> None:
    case = make_case(kind=kind, **SHAPE)  # type: ignore[arg-type]
    once = products(lambda: row_covariance(case.head))
    assert once == pytest.approx(D / T, rel=0.02)
    assert products(loss_of(case, "mse", weighting)) < 0.05


def test_a_second_head_costs_one_more_product_and_sparse_kld_one_fewer_at_the_first_update() -> None:
    for kind in ("dense", "mixed"):
        own = make_case(kind=kind, own_head=True, **SHAPE)  # type: ignore[arg-type]
        assert products(loss_of(own, "kld")) == pytest.approx(3 + (D + 2) / D, rel=0.02)
    first = make_case(kind="sparse", **SHAPE)  # type: ignore[arg-type]
    first.hidden = first.target.old.clone().requires_grad_()
    assert products(loss_of(first, "kld")) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("objective", "weighting", "more"),
    [("kld", "mean", 0), ("lch", "mean", 1), ("lch", "policy", 1), ("mse", "mean", 1), ("mse", "policy", 1)],
)
def test_all_diagnostics_cost_one_product_where_the_loss_forms_no_logits(
    objective: str, weighting: str, more: int, kind: str
) -> None:
    case = make_case(kind=kind, **SHAPE)  # type: ignore[arg-type]
    given = (objective, case.hidden, case.head, case.target, weighting, 8)
    products(lambda: row_covariance(case.head))
    with_actions = products(lambda: lco_loss(*given, actions=case.actions)[0].backward())
    assert with_actions - products(loss_of(case, objective, weighting)) == pytest.approx(more, abs=1e-6)
    capped = make_case(kind=kind, softcap=5.0, **SHAPE)  # type: ignore[arg-type]
    given = (objective, capped.hidden, capped.head, capped.target, weighting, 8)
    assert products(lambda: lco_loss(*given, actions=capped.actions)) == products(lambda: lco_loss(*given))


def test_logprobs_make_two_products_and_one_without_a_gradient() -> None:
    case = make_case(**SHAPE)  # type: ignore[arg-type]
    assert products(lambda: token_logprobs(case.hidden, case.head, case.actions, 8)[0].sum().backward()) == 2
    with torch.no_grad():
        assert products(lambda: token_logprobs(case.hidden, case.head, case.actions, 8)) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"kind": "sparse"}, {"kind": "mixed"}, {"own_head": True}, {"softcap": 5.0}, {"trained": True}]
)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_tensor_exceeds_a_chunk_of_logits(objective: str, weighting: str, changes: dict[str, Any]) -> None:
    case = make_case(**SHAPE, **changes)
    with Largest() as largest:
        loss_of(case, objective, weighting)()
        lco_loss(objective, case.hidden, case.head, case.target, weighting, 8, actions=case.actions)[0].backward()
        token_logprobs(case.hidden, case.head, case.actions, 8)[0].sum().backward()
    assert 0 < largest.numbers <= V * (2 * D + 2)  # less than half of T x V; the covariance of two heads takes most


def test_half_precision_weights_are_upcast_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(**{**SHAPE, "dtype": torch.bfloat16})  # type: ignore[arg-type]
    monkeypatch.setattr("lco_lite.objectives.head.ROW_BLOCK", 64)
    with Largest() as largest:
        lco_loss("kld", case.hidden, case.head, case.target, chunk=2)[0].backward()
    assert 0 < largest.numbers <= 2 * V


def test_chunks_are_bounded_and_cover_all_tokens() -> None:
    cpu = torch.device("cpu")
    assert chunk_size(260, cpu) == 2048
    assert 16 <= chunk_size(151_936, cpu) * 151_936 * 4 / 2**20 <= 48  # MiB
    assert chunk_size(10**9, cpu) == 16
    for chunk in (1, 7, 64, 100, None):
        covered = [i for part in spans(64, chunk, 260, cpu) for i in range(*part.indices(64))]
        assert covered == list(range(64))
